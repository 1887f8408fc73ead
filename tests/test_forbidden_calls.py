"""Calls that could run what a file holds. The package has none of them, read off its syntax rather than its text."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_igpt"
FILES = sorted(PACKAGE.rglob("*.py"))
# (end of the name, argument, the value that it must have); None: the call is forbidden altogether
RULES = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "np.lib.format.read_array": ("allow_pickle", False),
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load", "dill.loads")),
    **dict.fromkeys(("marshal.load", "marshal.loads", "shelve.open", "runpy.run_path", "torch.hub.load")),
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load")),
    **dict.fromkeys(("yaml.load", "yaml.full_load", "yaml.load_all", "torch.jit.load", "pandas.read_pickle")),
}
SHELLS = ("subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output", "subprocess.Popen")


def name_of(node):
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def found_in(source):
    """(line, what is wrong) of every forbidden call."""
    tree = ast.parse(source)
    imported = {}  # so that ``from pickle import loads as read`` does not hide
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, *rest = name_of(node.func).split(".")
        name = ".".join([imported.get(first, first), *rest])
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if "trust_remote_code" in options:
            yield node.lineno, "trust_remote_code"
        if name in SHELLS and not (isinstance(value := options.get("shell"), type(None)) or is_constant(value, False)):
            yield node.lineno, f"{name} through a shell"
        for end, rule in RULES.items():
            whole = name == end or (("." in end or rule is not None) and name.endswith(f".{end}"))
            if whole and (rule is None or not is_constant(options.get(rule[0]), rule[1])):
                yield node.lineno, name if rule is None else f"{name} without {rule[0]}={rule[1]}"


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def test_no_call_can_run_what_a_file_holds():
    for path in FILES:
        # The command line executes the constants and signatures of this package's own files before it imports torch.
        own = {"exec", "compile"} if path.match("commands/help.py") else set()
        assert [call for call in found_in(path.read_text(encoding="utf-8")) if call[1] not in own] == [], path


def test_the_search_finds_calls_by_any_name_and_lets_others_pass():
    wrong = ["torch.load(path)", "torch.load(path, weights_only=wanted)", "from torch import load; load(path)"]
    wrong += ["import numpy as n; n.load(path, allow_pickle=True)", "from pickle import loads as read; read(b'')"]
    wrong += ["eval('1')", "from subprocess import run; run('ls', shell=wanted)", "load('a', trust_remote_code=False)"]
    assert all([*found_in(source)] for source in wrong)
    right = ["torch.load(path, weights_only=True)", "network.eval()", "import subprocess; subprocess.run(['ls'])"]
    assert not any([*found_in(source)] for source in right)
