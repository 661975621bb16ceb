"""What `import nemokernels` does and does not do, seen from fresh processes."""

import subprocess
import sys
from pathlib import Path


def run(code, cwd=None):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_touches_neither_triton_nor_the_library_nor_the_gpu():
    run(
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "import nemokernels\n"
        "assert ('triton' in sys.modules) == before\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not torch.ops.loaded_libraries, torch.ops.loaded_libraries\n"
        "nemokernels.backends('cpu')\n"
        "assert ('triton' in sys.modules) == before and not torch.cuda.is_initialized()\n"
    )


def test_everything_on_the_cpu_works_without_triton():
    run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, nemokernels, nemokernels.models\n"
        "y = nemokernels.rms_norm(torch.ones(2, 8), torch.ones(8))\n"
        "assert y.shape == (2, 8)\n"
    )


def test_commands_that_read_no_text_need_no_extra():
    run(
        "import sys\n"
        "for name in ('tokenizers', 'matplotlib', 'PIL', 'transformers', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "from nemokernels.train.cli import main\n"
        "assert main(['env']) == 0 and main(['models', 'Nemotron-H-8B']) == 0\n"
        "assert main(['generate', '.', '--prompt', 'x']) == 2\n"
    )


def test_sources_are_whole_without_an_installation():
    """Python in the folder of the sources imports these, even if a wheel is installed."""
    code = (
        "import sys\n"
        "editable = [f for f in sys.meta_path if 'editable' in f'{f} {f.__module__}']\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if f not in editable]\n"
        "import nemokernels.bench, nemokernels.models, nemokernels.train\n"
        "print(nemokernels.__file__, nemokernels.models.__file__)\n"
    )
    root = Path(__file__).resolve().parent.parent
    found = run(code, cwd=root)
    assert found == f"{root}/nemokernels/__init__.py {root}/models/__init__.py"


def test_types_are_declared():
    run(
        "from importlib import resources\n"
        "assert (resources.files('nemokernels') / 'py.typed').is_file()\n"
    )


def test_import_is_cheap_beside_torch():
    """Best of three, in processes whose files are already cached."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter()\n"
        "import nemokernels; print((time.perf_counter() - b) / (b - a))"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.5


def test_names_are_what_they_say():
    run(
        "import nemokernels\n"
        "assert sorted(nemokernels.__all__) == list(nemokernels.__all__)\n"
        "for name in nemokernels.__all__: getattr(nemokernels, name)\n"
    )
