"""The script as a text: a pure import, no flag that does nothing, parts above, programs below."""

import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import symtable
import sys
import tomllib
import zipfile

import pytest
from conftest import SCRIPT
from packaging.requirements import Requirement

import moirai_distill as md

SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
NODES = list(ast.walk(TREE))
FUNCTIONS = [node for node in NODES if isinstance(node, ast.FunctionDef)]
CALLS = [node for node in NODES if isinstance(node, ast.Call)]

# A room begins with a banner and ends with the next one; what stands above them all is the map.
BANNER = re.compile(r"# == (\S.*?) =+")
BANNERS = []  # (line number, title)
for number, line in enumerate(SOURCE.splitlines(), 1):
    found = BANNER.fullmatch(line)
    if found:
        BANNERS.append((number, found[1]))
ROOMS = [title for _, title in BANNERS]

DATA = {"Reading", "Series and windows"}
MODELS = {"Student", "Loss and metrics", "Teacher", "Labels", "Training"}
PROGRAMS = {"Commands", "Entry"}
# Who must not know whom. What an annotation says does not count: a type is no knowledge.
FOREIGN = {
    "Settings": {"Voice", "Files and signals"} | DATA | MODELS | PROGRAMS,
    "Voice": {"Files and signals"} | DATA | MODELS | PROGRAMS,
    "Files and signals": DATA | MODELS | PROGRAMS,
    "Reading": {"Series and windows"} | MODELS | PROGRAMS,
    "Series and windows": MODELS | PROGRAMS,
    "Student": DATA | (MODELS - {"Student"}) | PROGRAMS,
    "Loss and metrics": {*ROOMS} - {"Loss and metrics"},
    "Teacher": {"Student", "Loss and metrics"} | PROGRAMS,
    "Labels": {"Student", "Loss and metrics"} | PROGRAMS,
    "Training": {"Student", "Teacher", "Labels"} | DATA | PROGRAMS,
}

AT_IMPORT = """
import json, os, random, signal, sys, warnings
import numpy, pandas, torch, tqdm  # what they do at import is their own business

def state():
    handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    numbers = [random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()]
    torch_settings = [torch.get_num_threads(), str(torch.get_default_dtype())]
    filters = str(warnings.filters)
    return dict(os.environ), [*sys.path], handlers, numbers, torch_settings, filters, os.getcwd()

def watch(event, values):
    writes = event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in OUTWARD:
        done.append(event)

OUTWARD = ("os.putenv", "os.unsetenv", "os.mkdir", "os.rename", "os.remove", "os.system",
           "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "os.chdir")
before, done = state(), []
sys.addaudithook(watch)
import moirai_distill
events = [*done]
print(json.dumps([before == state(), events, sorted(sys.modules), moirai_distill.__file__]))
"""


# -- What the tests ask of the text ----------------------------------------------------------------


def room_of(line):
    """Title of the room that holds a line; empty above the first one."""
    above = [title for start, title in BANNERS if start <= line]
    return above[-1] if above else ""


def place(room):
    """Where a room stands in the order of the file."""
    return ROOMS.index(room) if room else -1


def names_set(statement):
    """Names that a statement of the module binds, but for imports."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return []
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def scopes(table):
    """All scopes below a symbol table."""
    for child in table.get_children():
        yield child
        yield from scopes(child)


def uses(source):
    """(room that uses, name) of all functions, classes and comprehensions; local names told apart.

    `source` has the lines of the script.
    """
    found = set()
    for scope in scopes(symtable.symtable(source, str(SCRIPT), "exec")):
        for symbol in scope.get_symbols():
            is_of_module = symbol.is_global() and symbol.get_name() in DEFINED
            if is_of_module and symbol.is_referenced():
                found.add((room_of(scope.get_lineno()), symbol.get_name()))
    return found


def without_annotations(source):
    """The script where every annotation is None; no line moves."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]  # ast counts bytes
    annotated = [node for node in NODES if isinstance(node, ast.AnnAssign | ast.arg)]
    places = [node.annotation for node in annotated if node.annotation]
    places += [function.returns for function in FUNCTIONS if function.returns]
    places.sort(key=lambda node: (node.lineno, node.col_offset), reverse=True)
    for node in places:
        assert node.lineno == node.end_lineno
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line[: node.col_offset] + b"None" + line[node.end_col_offset :]
    return b"".join(lines).decode()


def flags_of(command):
    """The flags of a command (name without dashes -> argparse's action)."""
    parser = md.build_parser(demo=False)
    (commands,) = [action for action in parser._actions if action.dest == "command"]
    actions = commands.choices[command]._actions
    return {action.dest: action for action in actions if action.dest != "help"}


def is_args(node):
    """Whether a node is `args` or `vars(args)`."""
    return ast.unparse(node) in ("args", "vars(args)")


def names_read(functions):
    """All NAME of `args.NAME`."""
    names = set()
    for function in functions:
        for node in ast.walk(function):
            is_attribute = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            if is_attribute and ast.unparse(node.value) == "args":
                names.add(node.attr)
    return names


def picked():
    """The dataclasses that `pick` fills from args, each with the names of its fields."""
    kinds = {call.args[0].id for call in CALLS if ast.unparse(call.func) == "pick"}
    fields_of = {}
    for kind in kinds:
        fields_of[kind] = {field.name for field in dataclasses.fields(getattr(md, kind))}
    return fields_of


DEFINED = {}  # name -> room
for statement in TREE.body:
    for name in names_set(statement):
        DEFINED[name] = room_of(statement.lineno)
USED = uses(SOURCE)
USED_WITHOUT_TYPES = uses(without_annotations(SOURCE))
ALL_FLAGS = {}
for command in md.COMMANDS:
    ALL_FLAGS |= flags_of(command)


# -- Import ----------------------------------------------------------------------------------------


def test_import_prints_nothing_writes_nothing_and_changes_nothing(tmp_path):
    path = os.pathsep.join([str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(os.environ) | {"PYTHONPATH": path}
    command = [sys.executable, "-B", "-c", AT_IMPORT]
    child = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert child.stderr == ""
    assert child.stdout.count("\n") == 1  # nothing but the line of the child itself
    unchanged, events, modules, file = json.loads(child.stdout)
    assert unchanged
    assert events == []
    assert file == str(SCRIPT)
    assert not list(tmp_path.iterdir())

    tops = {name.partition(".")[0] for name in modules}
    assert {"torch", "pandas"} <= tops
    lazy = {"uni2ts", "gluonts", "jax", "lightning", "pytorch_lightning", "lightning_fabric"}
    lazy |= {
        "huggingface_hub",
        "sklearn",
        "scipy",
        "matplotlib",
        "tensorboard",
        "onnx",
        "onnxruntime",
        "onnxscript",
    }
    assert tops & lazy == set()


# -- Flags -----------------------------------------------------------------------------------------


def test_every_flag_is_read_by_a_command_or_what_runs_it():
    """A check of its range is no use of a flag."""
    readers = [function for function in FUNCTIONS if room_of(function.lineno) == "Commands"]
    readers += [function for function in FUNCTIONS if function.name == "run_command"]
    read = names_read(readers).union(*picked().values())
    assert len(ALL_FLAGS) > 35
    assert ALL_FLAGS.keys() - read == set()


def test_every_field_that_is_picked_from_args_is_read_below():
    """Else a flag that does nothing could hide in a dataclass."""
    of_student = {*inspect.signature(md.PatchStudent).parameters}  # it takes its config as words
    for kind, fields in picked().items():
        read = set()
        for node in NODES:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value)
                if owner.endswith(("config", "request")):
                    read.add(node.attr)
        if kind == "StudentConfig":
            read = of_student
        assert fields - read == set(), kind


def test_every_field_that_is_picked_from_args_is_a_flag_of_its_commands():
    fields_of = picked()
    kinds = {"DataConfig", "ReadConfig", "StudentConfig", "TrainConfig", "TeacherRequest"}
    assert {*fields_of} == kinds | {"EvaluationDataConfig"}
    for fields in fields_of.values():
        assert fields - flags_of("train").keys() == set()
    for kind in ("DataConfig", "ReadConfig", "TeacherRequest"):  # of label and evaluate
        assert fields_of[kind] - flags_of("label").keys() == set()
        assert fields_of[kind] - flags_of("evaluate").keys() == set()


def test_every_name_read_from_args_is_a_flag():
    read = names_read(FUNCTIONS)
    assert len(read) > 25
    assert read - ALL_FLAGS.keys() - {"command"} == set()


def test_no_flag_is_assigned():
    changing = ("update", "setdefault", "pop", "clear", "popitem", "__setattr__", "__setitem__")
    changed = []
    for node in NODES:
        if isinstance(node, ast.Attribute | ast.Subscript) and is_args(node.value):
            if isinstance(node.ctx, ast.Store | ast.Del):
                changed.append(node.lineno)
            if isinstance(node, ast.Attribute) and node.attr in changing:
                changed.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            changed += [node.lineno] * is_args(node.args[0])
    assert changed == []


def test_no_default_stands_twice():
    with_default = []
    for call in CALLS:
        first = call.args[0] if call.args else None
        if not isinstance(first, ast.Constant) or not str(first.value).startswith("--"):
            continue
        for word in call.keywords:
            if word.arg == "default" and ast.unparse(word.value) != "None":
                with_default.append(first.value)
    assert len(with_default) > 35
    assert sorted(with_default) == sorted({*with_default})
    for kind in picked():
        for field in dataclasses.fields(getattr(md, kind)):
            assert field.default is dataclasses.MISSING, (kind, field.name)
            assert field.default_factory is dataclasses.MISSING, (kind, field.name)


def test_the_demo_changes_only_flags_of_train():
    assert md.DEMO.keys() - flags_of("train").keys() == set()


def test_every_number_has_a_range_and_every_range_a_flag():
    kinds = (int, float, md.int_or_auto, md.float_or_auto)
    numbers = {name for name, action in ALL_FLAGS.items() if action.type in kinds}
    assert len(numbers) > 20
    assert md.RANGES.keys() == numbers


# -- Rooms -----------------------------------------------------------------------------------------


def test_the_rooms_stand_in_the_order_in_which_the_map_lists_them():
    _, _, map_of_rooms = ast.get_docstring(TREE).partition("A map of the rooms.")
    listed = re.findall(r"^    (\w[\w ]*?)  +\S", map_of_rooms, re.MULTILINE)
    assert len(listed) == 12
    assert [title.lower() for title in ROOMS] == listed


def test_a_name_is_used_only_in_or_below_the_room_that_defines_it():
    assert {*DEFINED.values()} == {*ROOMS}
    assert len(USED) > 150
    too_early = [(name, room) for room, name in USED if place(room) < place(DEFINED[name])]
    assert sorted(too_early) == []


@pytest.mark.parametrize("room", FOREIGN)
def test_a_room_does_not_know_what_it_must_not(room):
    assert room in ROOMS
    assert FOREIGN[room] <= {*ROOMS}
    own = [name for user, name in USED if user == room and DEFINED[name] == room]
    assert own or room == "Voice"
    used = {name for user, name in USED_WITHOUT_TYPES if user == room}
    assert sorted(name for name in used if DEFINED[name] in FOREIGN[room]) == []


def test_args_stop_at_the_commands():
    rooms = set()
    for node in NODES:
        if isinstance(node, ast.Name) and node.id == "args":
            rooms.add(room_of(node.lineno))
        if isinstance(node, ast.arg) and node.arg == "args":
            rooms.add(room_of(node.lineno))
    assert {"Commands", "Entry"} <= rooms <= {"Settings", "Commands", "Entry"}


# -- Manners ---------------------------------------------------------------------------------------


def test_every_public_function_and_class_has_a_docstring():
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in TREE.body if isinstance(node, kinds) and node.name[0] != "_"]
    assert len(public) > 150
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_no_warning_is_silenced_but_one_of_torch_that_nobody_can_mend():
    silencers = r"filterwarnings|simplefilter|catch_warnings|PYTHONWARNINGS|captureWarnings"
    (function,) = [node for node in FUNCTIONS if node.name == "without_warning_of_torch"]
    lines = SOURCE.splitlines()
    inside = "\n".join(lines[function.lineno - 1 : function.end_lineno])
    assert re.findall(silencers, inside) == ["catch_warnings", "filterwarnings"]
    assert 'message=".*LeafSpec", category=FutureWarning' in inside
    assert re.findall(silencers, SOURCE) == re.findall(silencers, inside)


def test_no_error_is_swallowed_whole():
    handlers = [node for node in NODES if isinstance(node, ast.ExceptHandler)]
    assert len(handlers) > 15
    assert [handler.lineno for handler in handlers if handler.type is None] == []
    for handler in handlers:
        is_wide = re.search(r"\b(Base)?Exception\b", ast.unparse(handler.type))
        raises = any(isinstance(node, ast.Raise) for node in ast.walk(handler))
        assert raises or not is_wide, handler.lineno

    suppressed = [call for call in CALLS if ast.unparse(call.func).endswith("suppress")]
    kinds = [ast.unparse(kind) for call in suppressed for kind in call.args]
    assert kinds
    assert [kind for kind in kinds if kind.endswith("Exception")] == []


def test_no_environment_variable_is_set():
    assert "os.environ" in SOURCE
    setters = r"environ\[[^]]*\]\s*=[^=]|environ\.(setdefault|update|pop)|environ\s*\|?="
    assert re.search(f"{setters}|putenv|unsetenv", SOURCE) is None


def test_no_module_variable_is_written_by_a_function():
    assert [node.lineno for node in NODES if isinstance(node, ast.Global)] == []
    changed = []
    for node in NODES:
        if isinstance(node, ast.Attribute | ast.Subscript):
            is_written = isinstance(node.ctx, ast.Store | ast.Del)
            if is_written and ast.unparse(node.value) in DEFINED:
                changed.append(node.lineno)
    assert changed == []


def test_benchmarks_use_only_names_that_the_script_has():
    """No benchmark runs in the tests: a lost name would be found hours into a measurement."""
    programs = sorted((SCRIPT.parent / "benchmarks").glob("*.py"))
    used = set()
    for path in programs:
        for name in re.findall(r"\bmd\.([A-Za-z_]+)", path.read_text(encoding="utf-8")):
            used.add((path.name, name))
    assert len(used) > 40
    assert sorted((path, name) for path, name in used if not hasattr(md, name)) == []


def test_it_can_be_imported_from_a_zip(tmp_path):
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(SCRIPT, SCRIPT.name)
    code = "import moirai_distill as md; print(md.__file__, md.main(['label', '--list']))"
    environment = os.environ | {"PYTHONPATH": str(archive), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    child = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert child.stdout.splitlines()[-1] == f"{archive / SCRIPT.name} 0"
    assert child.stderr == ""


def test_the_header_for_uv_agrees_with_the_requirements():
    """Both are read by the rules of their own format (PEP 723, and a list of requirements)."""
    text = SCRIPT.read_text(encoding="utf-8")
    blocks = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", text)
    assert len(blocks) == 1
    header = tomllib.loads(re.sub(r"(?m)^# ?", "", blocks[0]))
    assert header.keys() == {"requires-python", "dependencies"}
    assert header["requires-python"] == ">=" + ".".join(map(str, md.OLDEST_PYTHON))

    lines = SCRIPT.with_name("requirements.txt").read_text().splitlines()
    required = {str(Requirement(line)) for line in lines if line and not line.startswith("#")}
    assert {str(Requirement(line)) for line in header["dependencies"]} == required
    assert len(header["dependencies"]) == len(required) > 5
