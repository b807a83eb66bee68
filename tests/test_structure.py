"""The script as a text: no side effect at import, every flag is used, parts stand above, programs below."""

import ast
import json
import os
import re
import subprocess
import symtable
import sys

import pytest
from conftest import SCRIPT

import moirai_distill as m

SOURCE = SCRIPT.read_text(encoding="utf-8")
LINES, TREE = SOURCE.splitlines(), ast.parse(SOURCE)
BANNER = re.compile(r"# [=\s]*(\d)  (\S.*?)[ =]*$")
BANNERS = [(line, int(found[1])) for line, text in enumerate(LINES, 1) if (found := BANNER.match(text))]
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]

AT_IMPORT = """
import json, os, random, signal, sys, warnings
import huggingface_hub, numpy, pandas, torch, tqdm  # what they do at import is their own business

def state():
    handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    numbers = [random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()]
    torch_settings = [torch.get_num_threads(), str(torch.get_default_dtype())]
    return dict(os.environ), [*sys.path], handlers, numbers, torch_settings, str(warnings.filters), os.getcwd()

def watch(event, values):
    writes = event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in OUTWARD:
        done.append(event)

OUTWARD = ("os.putenv", "os.unsetenv", "os.mkdir", "os.rename", "os.remove", "subprocess.Popen", "os.system",
           "socket.connect", "socket.getaddrinfo", "os.chdir")
before, done = state(), []
sys.addaudithook(watch)
import moirai_distill
events = [*done]
print(json.dumps([before == state(), events, sorted(sys.modules), moirai_distill.__file__]))
"""


def section(line):
    """Number of the section that holds a line."""
    return max([0] + [number for start, number in BANNERS if start <= line])


def names_set(statement):
    """Names that a statement of the module binds, but for imports."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return [] if isinstance(statement, ast.Import | ast.ImportFrom) else [node.id for node in targets]


def scopes(table):
    """All scopes below a symbol table."""
    for child in table.get_children():
        yield child
        yield from scopes(child)


DEFINED = {name: section(statement.lineno) for statement in TREE.body for name in names_set(statement)}
USED = {  # (section that uses, name): by functions, classes and comprehensions, local names told apart
    (section(scope.get_lineno()), symbol.get_name())
    for scope in scopes(symtable.symtable(SOURCE, str(SCRIPT), "exec"))
    for symbol in scope.get_symbols()
    if symbol.is_global() and symbol.is_referenced() and symbol.get_name() in DEFINED
}


def is_args(node):
    """Whether a node is `args`, `vars(args)`, or `run`, the name that carries vars(args) below the commands."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "vars"
    node = node.args[0] if called else node
    return isinstance(node, ast.Name) and node.id in ("args", "run")


def flags_read(function):
    """Flags that a function reads: args.NAME, run["NAME"], vars(args)[name] for name in a tuple of strings."""
    tuples = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Name)
        if all(isinstance(item, ast.Constant) for item in node.value.elts)
    }
    loops = {
        node.target.id: tuples.get(node.iter.id, ())
        for node in ast.walk(function)
        if isinstance(node, ast.comprehension) and isinstance(node.iter, ast.Name) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args" and isinstance(node.ctx, ast.Load):
            yield node.attr
        if isinstance(node, ast.Subscript) and is_args(node.value) and isinstance(node.ctx, ast.Load):
            key = node.slice
            yield from [key.value] if isinstance(key, ast.Constant) else loops.get(getattr(key, "id", None), ())


def flags():
    """All flags of all commands."""
    parser = m.build_parser(demo=False)
    words = [["train"], ["label"], ["evaluate", "--checkpoint", "a"], ["predict", "--checkpoint", "a", "--input", "b"]]
    words.append(["export", "--checkpoint", "a", "--format", "hub"])
    return {name for argv in words for name in vars(parser.parse_args(argv))} - {"command"}


def test_import_prints_nothing_writes_nothing_and_changes_nothing(tmp_path):
    path = os.pathsep.join([str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ) | {"PYTHONPATH": path}
    command = [sys.executable, "-B", "-c", AT_IMPORT]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert child.stderr == "" and child.stdout.count("\n") == 1  # nothing but the line of the child itself
    unchanged, events, modules, file = json.loads(child.stdout)
    assert unchanged and events == [] and file == str(SCRIPT) and not list(tmp_path.iterdir())
    tops = {name.partition(".")[0] for name in modules}
    assert {"torch", "pandas"} <= tops
    lazy = {"uni2ts", "lightning", "pytorch_lightning", "gluonts", "jax", "sklearn", "matplotlib", "tensorboard"}
    assert tops & (lazy | {"lightning_fabric", "onnx", "scipy"}) == set()


def test_every_flag_is_read_by_the_programs_below_the_command_line():
    read = {name for function in FUNCTIONS if section(function.lineno) > 1 for name in flags_read(function)}
    assert len(flags()) > 35 and flags() - read == set()


def test_every_name_read_from_args_is_a_flag():
    read = {name for function in FUNCTIONS for name in flags_read(function)}
    assert len(read) > 45 and read - flags() - {"command"} == set()


def test_no_flag_is_assigned():
    stores = (ast.Store, ast.Del)
    assigned = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, stores) and is_args(node.value)
    ]
    changed = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call)
        and (
            isinstance(node.func, ast.Name)
            and node.func.id in ("setattr", "delattr")
            and is_args(node.args[0])
            or isinstance(node.func, ast.Attribute)
            and node.func.attr in ("update", "setdefault", "pop", "clear", "popitem", "__setattr__", "__setitem__")
            and is_args(node.func.value)
        )
    ]
    assert assigned + changed == []


def test_no_default_stands_twice():
    calls = [node for node in ast.walk(TREE) if isinstance(node, ast.Call) and node.args]
    added = [
        node.args[0].value
        for node in calls
        if str(getattr(node.args[0], "value", None)).startswith("--")
        if any(word.arg == "default" and getattr(word.value, "value", word) is not None for word in node.keywords)
    ]
    assert len(added) > 35 and len(set(added)) == len(added)


def test_the_sections_stand_in_order_as_the_docstring_lists_them():
    assert [number for _, number in BANNERS] == list(range(1, 10))
    listed = re.findall(r"(?:^  |  )  (\d) (\w[\w ]+?)  ", ast.get_docstring(TREE), re.MULTILINE)
    titles = [BANNER.match(LINES[line - 1]).groups() for line, _ in BANNERS]
    assert len(listed) == 9
    for (number, name), (banner, title) in zip(listed, titles, strict=True):
        assert number == banner and title.lower().startswith(name)


def test_a_name_is_used_only_inside_or_below_the_section_that_defines_it():
    assert {*DEFINED.values()} >= {*range(1, 10)} and len(USED) > 60
    assert sorted((name, where) for where, name in USED if where < DEFINED[name]) == []


@pytest.mark.parametrize(
    ("where", "foreign"),
    [
        (2, {3, 4, 5, 6, 7}),  # data knows no models
        (3, {2, 4, 5, 6, 7}),  # nor do files
        (4, {2, 5, 6, 7}),  # the student knows no data and no teacher
        (5, {4, 6, 7}),  # the teacher knows no student and no loss
        (6, {1, 2, 3, 4, 5, 7}),  # the loss knows nothing
        (7, {2, 4, 5}),  # the loop knows not how labels are made
    ],
)
def test_a_section_does_not_know_what_it_must_not(where, foreign):
    inside = {name for name, number in DEFINED.items() if number == where}
    assert inside and [name for user, name in USED if user == where and DEFINED[name] in foreign] == []


def test_args_are_seen_by_the_command_line_the_commands_and_main_alone():
    nodes = [node for node in ast.walk(TREE) if isinstance(node, ast.Name | ast.arg)]
    assert {section(n.lineno) for n in nodes if getattr(n, "id", getattr(n, "arg", None)) == "args"} == {1, 8, 9}


def test_functions_have_at_most_60_lines_and_the_file_2000_of_120_columns():
    assert len(FUNCTIONS) > 60
    assert [(f.name, f.end_lineno - f.lineno + 1) for f in FUNCTIONS if f.end_lineno - f.lineno >= 60] == []
    assert len(LINES) <= 2000 and [number for number, line in enumerate(LINES, 1) if len(line) > 120] == []


def test_every_function_and_class_of_the_module_has_a_docstring():
    public = [node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(public) > 60 and [node.name for node in public if not ast.get_docstring(node)] == []


def test_no_warning_is_silenced_and_no_error_swallowed_whole():
    assert not re.search(r"filterwarnings|simplefilter|catch_warnings|PYTHONWARNINGS", SOURCE)
    handlers = [node for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler)]
    wide = [h for h in handlers if h.type is None or getattr(h.type, "id", "") in ("Exception", "BaseException")]
    assert (
        len(handlers) > 5 and [h.lineno for h in wide if not any(isinstance(n, ast.Raise) for n in ast.walk(h))] == []
    )
    assert [h.lineno for h in handlers if h.type is None] == []
    calls = [
        node for node in ast.walk(TREE) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
    ]
    assert [node.lineno for node in calls for name in node.args if ast.unparse(name).endswith("Exception")] == []


def test_no_environment_variable_is_set():
    writes = r"environ\[[^]]*\]\s*=[^=]|environ\.(setdefault|update|pop)|putenv|unsetenv|environ\s*\|?="
    assert "os.environ" in SOURCE and not re.search(writes, SOURCE)


def test_no_module_variable_is_written_by_a_function():
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)] == []


def test_benchmarks_use_only_names_that_the_script_has():
    """No benchmark runs in the tests: a name that was taken away would be found hours into a measurement."""
    programs = sorted((SCRIPT.parent / "benchmarks").glob("*.py"))
    used = {(path.name, name) for path in programs for name in re.findall(r"\bmd\.([A-Za-z_]+)", path.read_text())}
    assert len(used) > 40
    assert not {(path, name) for path, name in used if not hasattr(m, name)}
