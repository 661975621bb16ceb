"""The tree keeps its shape: sizes, import arrows, one folder per op, banned calls."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(p.parent for p in (ROOT / "nemokernels/ops").glob("*/__init__.py"))
SOURCES = sorted(
    p
    for folder in ("nemokernels", "models", "train", "bench")
    for p in (ROOT / folder).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp"))
LINES = {"setup.py": 120}


def lines(path):
    return len(path.read_text().splitlines())


def imports(path):
    """Absolute names of everything the file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", OPS, ids=lambda p: p.name)
def test_op_folder_is_complete(folder):
    have = {p.name for p in folder.iterdir() if p.suffix == ".py"}
    assert {"__init__.py", "ref.py", "op.py", "cost.py"} <= have
    assert (ROOT / "tests" / f"test_{folder.name}.py").exists()
    assert (ROOT / "bench" / f"bench_{folder.name}.py").exists()


@pytest.mark.parametrize("path", [ROOT / "setup.py", *SOURCES, *TESTS], ids=lambda p: p.name)
def test_files_stay_small(path):
    kernel = path.parent.parent.name == "ops" and path.name.startswith("kernel")
    assert lines(path) <= LINES.get(path.name, 600 if kernel else 400)


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: p.name)
def test_native_files_stay_small(path):
    assert lines(path) <= 800


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_arrows(path):
    """train -> bench -> models -> nemokernels; references know nothing of their registration."""
    layer = path.relative_to(ROOT).parts[0]
    names = list(imports(path))
    if layer == "nemokernels":
        above = ("nemokernels.models", "nemokernels.train", "nemokernels.bench")
        assert not [n for n in names if n.startswith(above)]
        if not path.name.startswith("kernel") and path.name != "_tl.py":
            assert not [n for n in names if n == "triton" or n.startswith("triton.")]
    if layer == "models":
        assert not [n for n in names if n.startswith(("nemokernels.train", "nemokernels.bench"))]
        assert not [n for n in names if n.startswith("nemokernels.ops")], "use the public functions"
    if layer == "bench":
        assert not [n for n in names if n.startswith("nemokernels.train")]
    if path.name == "ref.py":
        assert not [n for n in names if re.fullmatch(r"nemokernels\.ops\.\w+\.(op|kernel).*", n)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_banned_calls(path):
    text = path.read_text()
    banned = {
        r"\bpickle\b|torch\.load\(|torch\.save\(": "no pickle in the package",
        r"except( ImportError)?:\s*\n?\s*pass": "a swallowed error hides a broken build",
        r"triton\.autotune": "configurations are data, see plan()",
        r"make_block_ptr": "deprecated in Triton",
        r"program_id\(\d\) \* stride": "32 bits overflow, use offset64",
        r"trust_remote_code": "no remote code",
    }
    for pattern, reason in banned.items():
        assert not re.search(pattern, text), reason


def test_top_level():
    """Files git tracks at the top are the ones the README's map shows."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    readme = (ROOT / "README.md").read_text()
    for name in {Path(p).parts[0] for p in tracked}:
        if not name.startswith("."):
            assert name in readme, f"{name} is missing from the README's map"
