"""Compiling csrc/, what the library asks of the loader, and wheels with and without it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from machine_code import compiled, functions_of, needs_nvcc, output

import nemokernels
from nemokernels import _build, _ext

ROOT = Path(__file__).resolve().parent.parent
TREE = ("csrc", "nemokernels", "models", "train", "bench", "setup.py", "pyproject.toml",
        "README.md", "LICENSE")  # fmt: skip


@pytest.fixture
def library(build_cache):
    return _build.build(["90a"])


@needs_nvcc
@pytest.mark.parametrize("arch", ["90a", "100a"])
def test_no_kernel_spills_registers(build_cache, arch):
    """Sources of one architecture alone have tests of their own."""
    units = [u for u in _build._files(".cu") if _build.own_arch(u) is None]
    assert units
    for unit in units:
        made, report = _build.compile_unit(unit, [arch], _build.find_nvcc())
        assert report.count("Compiling entry function") > 0
        assert _build.spills(report) == {}, f"{unit.name} for sm_{arch}"
        assert f"sm_{arch}".encode() in made.read_bytes()


def test_spills_are_read_from_the_report():
    report = """ptxas info    : Compiling entry function '_Zgood' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Zbad' for 'sm_90a'
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads"""
    assert _build.spills(report) == {"_Zbad": 12}


@needs_nvcc
def test_library_asks_the_loader_only_for_the_stable_interface(library):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", library))
    assert {"libtorch_cuda.so", "libtorch_cpu.so", "libtorch.so"} <= set(needed)
    assert not [n for n in needed if "python" in n or "c10" in n]
    undefined = output("nm", "-DC", "--undefined-only", library)
    assert "aoti_torch_get_current_cuda_stream" in undefined
    assert not re.search(r"\b(at|c10|torch)::", undefined)
    assert b"sm_90a" in library.read_bytes()


@needs_nvcc
def test_forward_moves_sixteen_bytes_at_a_time(build_cache):
    functions = functions_of("inst_bf16.cu")
    names = [f for f in functions if "ForwardKernel" in f.split("\n")[0] and "LDG.E.128" in f]
    assert len(names) == 3 and all("STG.E.128" in f for f in names)  # widths 2, 3 and 4


@needs_nvcc
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_w4a16_multiplies_on_tensor_cores(build_cache, dtype):
    """Codes in 8-byte loads and x in 16-byte ones, block scales converted two at a time."""
    functions = functions_of(f"w4a16_{dtype}.cu")
    assert len(functions) == 4  # 8, 16 and 32 rows, and 8 that begin early
    for code in functions:
        for word in (r"HMMA\.16816", r"LDG\.E\S+\.64", r"LDG\.E\.128", "HMUL2", r"F2FP\.F16\.E4M3"):
            assert re.search(word, code), word


@needs_nvcc
@pytest.mark.parametrize("dtype, kind", [("bf16", r"\.F32\.BF16"), ("fp16", r"\.F32")])
def test_wide_w4a16_multiplies_from_registers(build_cache, dtype, kind):
    """By warpgroups, 256 rows of x or 128; results are turned without shared memory."""
    functions = functions_of(f"w4a16_wide_{dtype}.cu")
    assert len(functions) == 3  # plain, up, slots
    for code in functions:
        for columns in (128, 256):  # the left operand is a register
            product = rf"HGMMA\.64x{columns}x16{kind} R\d+, R\d+, gdesc"
            assert len(re.findall(product, code)) == 4
        for word in ("USETMAXREG", "UBLKCP", "MOVM.16.MT88", "HMUL2", "STG.E.128"):
            assert word in code, word
    assert_registers_change_hands(compiled(f"w4a16_wide_{dtype}.cu")[1], 3)


def assert_registers_change_hands(report, kernels):
    """All 64 K registers are given away, at 168 for each thread before they change hands: a kernel
    with another number would wait for registers that never come. And no products are serialised."""
    assert re.findall(r"Used (\d+) registers", report) == ["168"] * kernels
    assert not re.search(r"C75\d\d", report)


@needs_nvcc
@pytest.mark.parametrize("dtype, kernels, product", [
    ("bf16", 11, r"HGMMA\.64x{}x16\.F32\.BF16 "), ("fp16", 11, r"HGMMA\.64x{}x16\.F32 "),
    ("e4m3", 4, r"QGMMA\.64x{}x32\.F32\.E4M3\.E4M3 "),
])  # fmt: skip
def test_moe_experts_multiply_by_warpgroups(build_cache, dtype, kernels, product):
    """Weights come in boxes and tokens in 16-byte pieces."""
    name = f"moe_experts_{dtype}.cu"
    functions = functions_of(name)
    assert len(functions) == kernels
    for code in functions:
        columns, part = re.search(r"Li(\d+)ELNS\w+PartE(\d)E", code).groups()
        assert len(re.findall(product.format(columns), code)) == 4  # of a stage
        for word in ("USETMAXREG", "UTMALDG.3D", "STG.E.128"):
            assert word in code, word
        gathers = "LDGSTS.E.BYPASS" in code and "FENCE.VIEW.ASYNC" in code
        assert gathers == (part != "1")  # all but kSlots
        calls = dtype == "e4m3" and part == "0"  # the reciprocal of what comes up
        assert code.count("CALL") == calls, "a division in 64 bits, a root by steps?"
        store = code.rpartition("WARPGROUP.DEPBAR.LE gsb0, 0x0")[2].partition("USETMAXREG")[0]
        assert "STG.E.128" in store
        assert dtype == "e4m3" or "LDG" not in store  # all is asked for while products run
        assert code.count("MUFU.SQRT") == (192 // 2 if part == "2" else 0)
    assert_registers_change_hands(compiled(name)[1], kernels)


@needs_nvcc
def test_library_is_found_and_named_by_its_sources(library, build_cache, monkeypatch):
    digest = _build.source_digest()
    assert library.parent == build_cache / "nemokernels"
    assert library.name == f"_C-{digest}-90a.so" and _ext.archs(library) == ["90a"]
    _ext.find.cache_clear()
    assert _ext.find() == (library, None)
    monkeypatch.setattr(_build, "source_digest", lambda: "0" * 16)
    _ext.find.cache_clear()
    path, why = _ext.find()
    assert path is None and "built from other sources" in why
    monkeypatch.setenv("XDG_CACHE_HOME", str(build_cache / "empty"))
    _ext.find.cache_clear()
    assert _ext.find() == (None, "the CUDA library is not built; run `nemokernels build` "
                           "(needs nvcc)")  # fmt: skip
    _ext.find.cache_clear()


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_a_library_that_does_not_load_says_why(library):
    assert re.search(r"does not load: libtorch_cuda\.so", _ext.load(library))


def test_reasons(monkeypatch):
    assert "this is cpu" in _ext.reason(torch.device("cpu"))
    if torch.version.cuda is None:
        assert "built without CUDA" in _ext.reason(torch.device("cuda"))
    assert "needs sm_90 or newer, this device is sm_89" in _ext._reason_on((8, 9))
    monkeypatch.setattr(_ext, "find", lambda: (Path("_C-0123-90a-100a.so"), None))
    _ext._reason_on.cache_clear()
    assert "built for sm_90a, sm_100a, this device is sm_120" in _ext._reason_on((12, 0))
    _ext._reason_on.cache_clear()


def test_bad_arguments(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"build: `archs` has '80', expected some of 90a"):
        _build.build(["80"])
    monkeypatch.setattr(_build, "local_archs", lambda: [])
    with pytest.raises(ValueError, match="build: no supported GPU here; name `archs`"):
        _build.build()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="build: no nvcc"):
        _build.build(["90a"], out=tmp_path)
    with pytest.raises(RuntimeError, match="No such file or directory"):
        _build._run(["c++", str(tmp_path / "absent.cpp")])


@pytest.fixture
def tree(tmp_path):
    """A copy to build in; what a build leaves behind stays out of the sources."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, copy / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


def build_wheel(tree, **environment):
    env = {**os.environ, **environment}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v",
               "-w", str(tree / "out"), str(tree)]  # fmt: skip
    said = output(*command, env=env)
    (wheel,) = (tree / "out").iterdir()
    return wheel, said


def install(wheel, folder):
    """A fresh environment with this wheel; torch comes from the environment that runs the tests."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    output(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    env["XDG_CACHE_HOME"] = str(folder)  # nothing that was built for somebody else

    return lambda code: output(python, "-c", code, cwd=folder, env=env).split("\n")[:-1]


def test_wheel_without_nvcc_is_pure_and_carries_the_sources(tree, tmp_path):
    for left_over in ("ops/gone/__init__.py", "_C-0-90a.so"):  # by an earlier build of the tree
        path = tree / "build/lib/nemokernels" / left_over
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    wheel, said = build_wheel(tree, PATH=str(tmp_path), CUDA_HOME="")
    names = zipfile.ZipFile(wheel).namelist()
    assert "nemokernels/ops/ssd/kernel.py" in names
    assert not [n for n in names if "gone" in n or n.endswith(".so")]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "csrc/ is not compiled: there is no nvcc" in said
    home, csrc, digest, why = install(wheel, tmp_path / "venv")(
        "import nemokernels.models, nemokernels.train\n"
        "from nemokernels import _build, _ext\n"
        "print(*nemokernels.__path__, _build.source_dir(), sep='\\n')\n"
        "print(_build.source_digest(), _ext.find()[1], sep='\\n')"
    )
    assert home.startswith(str(tmp_path)) and csrc == f"{home}/_csrc"
    assert digest == _build.source_digest() and "not built" in why


def test_source_distribution_holds_what_git_tracks(tmp_path):
    tracked = output("git", "ls-files", cwd=ROOT).split()
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    build = "import setuptools.build_meta as b; b.build_sdist('out')"
    output(sys.executable, "-c", build, cwd=tmp_path)
    (made,) = (tmp_path / "out").iterdir()
    assert made.name == f"nemokernels-{nemokernels.__version__}.tar.gz"
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not set(tracked) - held


def test_asking_for_architectures_without_nvcc_fails(tree, tmp_path):
    with pytest.raises(AssertionError, match="NEMOKERNELS_CUDA_ARCHS is set, but there is no nvcc"):
        build_wheel(tree, PATH=str(tmp_path), CUDA_HOME="", NEMOKERNELS_CUDA_ARCHS="90a")


def fresh_setup(tree, *before, **environment):
    """What setup.py says, run after the lines ``before``, where it refuses to build."""
    code = "\n".join([*before, "import runpy", "runpy.run_path('setup.py')"])
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True,
                          env={**os.environ, **environment})  # fmt: skip
    assert done.returncode == 1 and not done.stdout
    return done.stderr


@needs_nvcc
def test_an_unknown_architecture_is_one_line(tree):
    said = fresh_setup(tree, NEMOKERNELS_CUDA_ARCHS="90a;80")
    assert said == "NEMOKERNELS_CUDA_ARCHS is set, but 80 is none of 90a 100a 120a\n"


def test_an_old_setuptools_is_one_line(tree):
    said = fresh_setup(tree, "import setuptools", "setuptools.__version__ = '65.5.0'")
    assert said.startswith("nemokernels is built by setuptools 77 or newer, this is 65.5.0")
    assert said.count("\n") == 1
    project = (ROOT / "pyproject.toml").read_text()
    minimum = re.search(r'requires = \["setuptools>=(\d+)"\]', project)
    assert f"setuptools {minimum[1]} or newer" in said


@needs_nvcc
def test_wheel_with_nvcc_holds_the_library(library, build_cache, tree, tmp_path):
    wheel, _ = build_wheel(tree, NEMOKERNELS_CUDA_ARCHS="90a", XDG_CACHE_HOME=str(build_cache))
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    home, found = install(wheel, tmp_path / "venv")(
        "import nemokernels; from nemokernels import _ext\n"
        "print(nemokernels.__path__[0], _ext.find()[0], sep='\\n')"
    )
    assert home.startswith(str(tmp_path)) and found == f"{home}/{library.name}"
