import pytest
import torch

from nemokernels import mamba_chunk_scan_combined as scan
from nemokernels import mamba_split_conv1d_scan_combined as mixer

BAD_SCAN = [
    (dict(x=[1.0]), TypeError, "`x` must be a torch.Tensor"),
    (dict(x=torch.ones(2, 6, 4)), ValueError, "`x` has shape"),
    (dict(dt=torch.ones(2, 6, 3)), ValueError, "`dt` has shape"),
    (dict(dt=torch.ones(2, 6, 4).int()), TypeError, "`dt` is torch.int32"),
    (dict(A=torch.ones(3)), ValueError, "`A` has shape"),
    (dict(B=torch.ones(2, 6, 3, 5), C=torch.ones(2, 6, 3, 5)), ValueError, "`B` has 3 groups"),
    (dict(B=torch.ones(2, 6, 2, 5).double()), TypeError, "`B` is torch.float64"),
    (dict(C=torch.ones(2, 6, 2, 4)), ValueError, "`C` has shape"),
    (dict(chunk_size=0), ValueError, "`chunk_size` must be"),
    (dict(chunk_size=2.0), ValueError, "`chunk_size` must be an integer"),
    (dict(D=torch.ones(4, 2)), ValueError, "`D` has shape"),
    (dict(z=torch.ones(2, 6, 4)), ValueError, "`z` has shape"),
    (dict(dt_bias=torch.ones(4, device="meta")), ValueError, "`dt_bias` is on meta"),
    (dict(initial_states=torch.ones(1, 4, 3, 5)), ValueError, "`initial_states` has shape"),
    (dict(seq_idx=torch.ones(2, 6)), TypeError, "`seq_idx` is torch.float32"),
    (dict(cu_seqlens=torch.tensor([0, 6]).int()), ValueError, "`x` must have one row"),
    (dict(cu_seqlens=torch.zeros(0).int()), ValueError, "`cu_seqlens` needs at least one"),
    (dict(return_varlen_states=True), ValueError, "`return_varlen_states` needs `cu_seqlens`"),
    (dict(dt_limit=(2.0, 1.0)), ValueError, "`dt_limit` is"),
    (dict(dt_limit=(-1.0, 1.0)), ValueError, "`dt_limit` is"),
    (dict(state_dtype=torch.int8), TypeError, "`state_dtype` is torch.int8"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_SCAN)
def test_bad_scan_input(change, error, message):
    good = dict(x=torch.ones(2, 6, 4, 3), dt=torch.ones(2, 6, 4), A=-torch.ones(4),
                B=torch.ones(2, 6, 2, 5), C=torch.ones(2, 6, 2, 5), chunk_size=4)  # fmt: skip
    with pytest.raises(error, match=message):
        scan(**{**good, **change})


@pytest.mark.parametrize("bounds", [[1, 6], [0, 4, 3], [0, 7]])
def test_bad_cu_seqlens(bounds):
    with pytest.raises(ValueError, match="`cu_seqlens` is"):
        scan(torch.ones(1, 6, 4, 3), torch.ones(1, 6, 4), -torch.ones(4), torch.ones(1, 6, 2, 5),
             torch.ones(1, 6, 2, 5), 4, cu_seqlens=torch.tensor(bounds).int())  # fmt: skip


ONE = torch.ones(4)
BAD_MIXER = [
    (dict(zxbcdt=torch.ones(2, 48)), ValueError, "`zxbcdt` has shape"),
    (dict(zxbcdt=torch.ones(2, 6, 47)), ValueError, r"`zxbcdt` has 47 features, expected 2 \* M"),
    (dict(zxbcdt=torch.ones(2, 6, 46)), ValueError, "`zxbcdt` has 46 features"),
    (dict(conv1d_weight=torch.ones(33, 4)), ValueError, "`conv1d_weight` has 33 rows"),
    (dict(conv1d_weight=torch.ones(8, 4)), ValueError, "`conv1d_weight` has 8 rows"),
    (dict(conv1d_bias=torch.ones(3)), ValueError, "mamba_split_conv1d.*`bias` has shape"),
    (dict(D=None), TypeError, "`D` must be a torch.Tensor"),
    (dict(D=torch.ones(4, 3, 1)), ValueError, "`D` has shape"),
    (dict(headdim=None), ValueError, "`headdim` is None"),
    (dict(headdim=4, D=torch.ones(4, 3)), ValueError, "`headdim` is 4, but `D` has 3"),
    (dict(ngroups=0), ValueError, "`ngroups` must be"),
    (dict(chunk_size=0), ValueError, "`chunk_size` must be"),
    (dict(dt_bias=torch.ones(3)), ValueError, "`dt_bias` has shape"),
    (dict(activation="gelu"), ValueError, "`activation` is 'gelu'"),
    (dict(rmsnorm_weight=torch.ones(3)), ValueError, "`weight` has shape"),
    (dict(outproj_bias=torch.ones(3)), ValueError, "`outproj_bias` needs `outproj_weight`"),
    (dict(outproj_weight=torch.ones(5, 11)), ValueError, "`outproj_weight` has shape"),
    (dict(outproj_weight=torch.ones(5, 12), outproj_bias=torch.ones(4)), ValueError,
     "`outproj_bias` has shape"),
    (dict(seq_idx=torch.zeros(2, 6).int(), cu_seqlens=torch.tensor([0]).int()), ValueError,
     "`seq_idx` and `cu_seqlens` exclude"),
    (dict(cu_seqlens=torch.tensor([0, 6]).int()), ValueError, "`zxbcdt` must have one row"),
    (dict(conv1d_weight=torch.ones(32, 5)), ValueError, "`weight` has 5 taps"),
    (dict(dt_limit=(2.0, 1.0)), ValueError, "`dt_limit` is"),
    (dict(initial_states=torch.ones(2, 4, 3, 4)), ValueError, "`initial_states` has shape"),
    (dict(norm=max, rmsnorm_weight=torch.ones(12)), ValueError, "`norm` excludes `rmsnorm_weight`"),
    (dict(norm=max, outproj_weight=torch.ones(5, 12)), ValueError, "`norm` excludes"),
    (dict(norm=max, zxbcdt=torch.ones(2, 6, 50)), ValueError, "`norm` excludes .* and an MLP"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD_MIXER)
def test_bad_mixer_input(change, error, message):
    good = dict(zxbcdt=torch.ones(2, 6, 48), conv1d_weight=torch.ones(32, 4), conv1d_bias=None,
                dt_bias=ONE, A=-ONE, D=ONE, chunk_size=4, headdim=3, ngroups=2)  # fmt: skip
    with pytest.raises(error, match=message):
        mixer(**{**good, **change})
