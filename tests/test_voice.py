"""The voice: every sentence has its Chinese, with the same places for values; silence is silent."""

import ast
import os
import re
import string
import sys
from pathlib import Path

import pytest
from conftest import SCRIPT, hourly, quiet_voice

import moirai_distill as md

TREE = ast.parse(SCRIPT.read_text(encoding="utf-8"))
ERRORS = [name for name, kind in vars(md).items() if isinstance(kind, type)]
ERRORS = [name for name in ERRORS if issubclass(getattr(md, name), md.Told)]
TELLING = ("say", "note", "warn", "_tell", "Message", *ERRORS)
SAME_IN_BOTH = {"--data_dir {}", "--input {}: {}", "--{} {}: {}"}  # flags alone
MACHINERY = ("linked", "message", "in_language", "say", "note", "warn", "_tell")
TOLD_LISTS = ("problems", "differences", "warnings", "skipped", "notes", "reasons")
HAN = re.compile(r"[\u4e00-\u9fff]")
ENGLISH_CLAUSE = re.compile(r"[A-Za-z']{2,}(?: [A-Za-z']{2,}){2}")  # three words in a row
# Functions whose texts are no sentences of the table: what argparse shows, what goes into files and
# pictures, and the reasons of a damaged file, which stand in brackets behind a sentence.
ENGLISH_ROOMS = {"build_parser", *(name for name in vars(md) if re.match("add_.*_flags", name))}
ENGLISH_ROOMS |= {"begin_labels", "point_in_key", "making_of", "misfit", "onnx_facts"}
ENGLISH_ROOMS |= {"card_making", "card_scores", "card_data"}
ENGLISH_ROOMS |= {"draw", "draw_history", "draw_evaluation", "error_panel"}


def name_of(call):
    """Name of what a call calls; "" where it has none."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def nodes_in(tree, room=""):
    """(node, name of the innermost function that it stands in) of all nodes of a tree."""
    for node in ast.iter_child_nodes(tree):
        inner = node.name if isinstance(node, ast.FunctionDef) else room
        yield node, inner
        yield from nodes_in(node, inner)


def tellings():
    """All calls in the script that tell something, but for the machinery that takes sentences."""
    found = []
    for node, room in nodes_in(TREE):
        is_telling = isinstance(node, ast.Call) and name_of(node) in TELLING and node.args
        if is_telling and room not in MACHINERY:
            found.append(node)
    return found


def sentence_of(call):
    """The sentence of a telling call; None where it is a variable."""
    first = call.args[0]
    if isinstance(first, ast.Constant):
        return first.value
    is_constant = isinstance(first, ast.Name) and first.id.isupper()
    return getattr(md, first.id) if is_constant else None


def spoken():
    """All sentences that the script tells, as they are written: results, notes and errors."""
    sentences = {sentence_of(call) for call in tellings()} - {None}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call) and name_of(node) == "_tell":  # what stands before a note
            sentences.add(node.args[0].value)
    return sentences


def places(sentence):
    """(name, format, conversion) of each place for a value in a sentence."""
    found = [place[1:] for place in string.Formatter().parse(sentence)]
    return [place for place in found if place != (None, None, None)]


def has_letters(sentence):
    """Whether a sentence says something in a language, outside its places for values."""
    text = "".join(place[0] for place in string.Formatter().parse(sentence))
    return any(character.isalpha() for character in text)


def values_for(sentence):
    """Something to stand in each place of a sentence."""
    formats = [form for _, form, _ in places(sentence)]
    return [7 if form[-1:] in ("f", "e", "g", ",") else "x" for form in formats]


# -- The table -------------------------------------------------------------------------------------


def test_what_is_told_is_a_literal_sentence():
    """An f-string, or a sentence in a variable, would find no entry in the table.

    A variable may be a Message, which `note` and `warn` take as it is.
    """
    calls = tellings()
    assert len(calls) > 250
    assert {name_of(call) for call in calls} >= {"say", "note", "warn", "Message", "UserError"}
    for call in calls:
        is_variable = isinstance(call.args[0], ast.Name) and name_of(call) in ("note", "warn")
        assert isinstance(sentence_of(call), str) or is_variable, f"line {call.lineno}"
        assert call.keywords == [], f"line {call.lineno}"


def test_what_is_told_is_made_of_parts():
    """Neither an f-string nor a text with words stands among the values of a sentence."""
    for call in tellings():
        for part in [node for value in call.args for node in ast.walk(value)]:
            is_format = isinstance(part, ast.Call) and name_of(part) == "format"
            is_modulo = isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mod)
            is_text = is_modulo and isinstance(part.left, ast.Constant | ast.JoinedStr)
            assert not isinstance(part, ast.JoinedStr), f"line {part.lineno}"
            assert not is_format and not is_text, f"line {part.lineno}"
        texts = [node for value in call.args[1:] for node in outside_of_messages(value)]
        for text in texts:
            assert not re.search(r"[a-z]{2,} [a-z]{2,}", text.value), f"line {text.lineno}"


def outside_of_messages(value):
    """The literal texts in a value, but for those that are sentences of a Message."""
    if isinstance(value, ast.Call) and name_of(value) in TELLING:
        return []
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return [value]
    return [text for part in ast.iter_child_nodes(value) for text in outside_of_messages(part)]


def test_each_text_with_words_is_a_sentence_that_is_told():
    """Another one might reach an error or a note by way of a variable."""
    sentences = {call.args[0] for call in tellings()}
    not_told = set()  # docstrings, and the reasons of ValueErrors
    texts = {}
    for node, room in nodes_in(TREE):
        if isinstance(node, ast.Call) and name_of(node) == "ValueError":
            not_told.update(ast.walk(node))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            not_told.add(node.body[0].value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts[node] = room
    assert len(not_told) > 500
    for node, room in texts.items():
        has_words = re.search(r"[A-Za-z]{2,} [A-Za-z]{2,}", node.value)
        is_command = node.value.startswith("python moirai_distill.py ")
        is_english = room in ("", *ENGLISH_ROOMS) or is_command or node in not_told
        assert not has_words or node in sentences or is_english, f"line {node.lineno}"


def test_lists_that_are_told_hold_messages():
    told = []
    for node, room in nodes_in(TREE):
        is_append = isinstance(node, ast.Call) and name_of(node) == "append"
        is_list = is_append and ast.unparse(node.func.value).rpartition(".")[2] in TOLD_LISTS
        if is_list and room not in ENGLISH_ROOMS:
            told.append(node)
    assert len(told) > 30
    for node in told:
        assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr), f"line {node.lineno}"


def values_of(call):
    """The values that a telling call gives a sentence, as nodes; None where a variable has them."""
    given = call.args[1:]
    if name_of(call) == "Message" and given:
        given = [ast.Starred(given[0])]
    values = []
    for value in given:
        inner = value.value if isinstance(value, ast.Starred) else None
        if inner is not None and not isinstance(inner, ast.Tuple):
            return None
        values += inner.elts if inner else [value]
    return None if any(isinstance(value, ast.Starred) for value in values) else values


def test_what_is_told_has_a_value_for_each_place():
    compared = 0
    for call in tellings():
        sentence = sentence_of(call)
        values = values_of(call)
        if sentence and values is not None:
            assert len(values) == len(places(sentence)), f"line {call.lineno}"
            compared += 1
    assert compared > 200


def test_every_sentence_with_letters_has_its_chinese():
    with_letters = {sentence for sentence in spoken() if has_letters(sentence)}
    assert len(with_letters) > 250
    assert sorted(with_letters - md.CHINESE.keys() - SAME_IN_BOTH) == []


def test_every_entry_of_the_table_is_said_somewhere():
    assert sorted(md.CHINESE.keys() - spoken()) == []


@pytest.mark.parametrize("english", md.CHINESE)
def test_both_languages_have_the_same_places_for_values(english):
    """In the same order, as values are told apart by their order alone."""
    assert places(english) == places(md.CHINESE[english])
    assert {name for name, _, _ in places(english)} <= {""}


@pytest.mark.parametrize("chinese", md.CHINESE.values())
def test_the_chinese_has_no_english_clause(chinese):
    without_commands = re.sub(r"`.*?`|pip install -r|python moirai_distill.*", "", chinese)
    assert not ENGLISH_CLAUSE.search(without_commands)


def test_the_languages_are_not_swapped():
    for english, chinese in md.CHINESE.items():
        assert not HAN.search(english)
        assert HAN.search(chinese) or chinese == english  # such as "Epoch 1/10"
    translated = [english for english, chinese in md.CHINESE.items() if chinese != english]
    assert len(translated) > 0.9 * len(md.CHINESE)


# -- What is heard ---------------------------------------------------------------------------------


@pytest.mark.parametrize("english", md.CHINESE)
def test_a_sentence_is_heard_in_the_language_of_the_voice(english, capsys):
    values = values_for(english)
    md.Voice("en").say(english, *values)
    assert capsys.readouterr() == (english.format(*values) + "\n", "")
    md.Voice("zh").say(english, *values)
    assert capsys.readouterr() == (md.CHINESE[english].format(*values) + "\n", "")


def test_values_are_never_taken_for_places(capsys):
    for language in ("en", "zh"):
        md.Voice(language).say("{}", "a folder {0} {name}")
        assert capsys.readouterr().out == "a folder {0} {name}\n"


def test_a_chinese_run_prints_chinese_and_an_english_one_none(tmp_path, capsys):
    for language in ("zh", "en"):
        argv = ["label", "--list", "--label_cache", str(tmp_path / "none"), "--lang", language]
        assert md.main(argv) == 0
        assert bool(HAN.search(capsys.readouterr().out)) == (language == "zh")


def test_notes_and_warnings_go_to_stderr(capsys):
    voice = md.Voice("en")
    voice.note("3 things")
    voice.note("{} things", 3)
    voice.warn("it is late")
    heard = "note: 3 things\nnote: 3 things\nWARNING: it is late\n"
    assert capsys.readouterr() == ("", heard)


def test_a_message_inside_a_message_is_told_in_the_same_language():
    inner = md.UserError("{} is not installed: pip install -r requirements.txt, or pip install {}")
    inner.args = (*inner.args, "x", "x")
    outer = md.Message("error: {}", (inner,))
    assert md.in_language(outer, "en").startswith("error: x is not installed")
    assert md.in_language(outer, "zh").startswith("错误: 未安装 x")
    assert str(outer) == md.in_language(outer, "en")


def test_a_sentence_without_values_may_hold_braces(capsys):
    md.Voice("en").note("a folder {x}")
    assert capsys.readouterr().err == "note: a folder {x}\n"
    assert str(md.UserError("{0}")) == "{0}"


def test_a_told_exception_survives_a_process_border():
    import pickle

    error = pickle.loads(pickle.dumps(md.UserError("{}: no such checkpoint", "a/b")))
    assert str(error) == "a/b: no such checkpoint"
    assert isinstance(error, md.UserError)


@pytest.mark.parametrize("flags", [["--lang", "zh"], ["--lang=zh"]])
def test_an_error_is_told_in_the_language_that_is_asked_for(flags, capsys):
    assert md.main(["--wrong", *flags]) == 2
    assert capsys.readouterr().err.startswith("错误: ")
    assert md.main(["--wrong", "--lang", "en"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_voice_that_is_off_prints_nothing(capsys):
    voice = quiet_voice()
    voice.say("Teacher loaded")
    voice.note("something")
    voice.warn("something")
    with voice.bar("working", total=2) as bar:
        bar.update()
        bar.refresh()
    assert capsys.readouterr() == ("", "")


def test_a_muted_voice_prints_notes_but_no_results(capsys):
    """So it is while --alpha auto tries: five trials would print five trainings."""
    voice = md.Voice("en")
    voice.is_muted = True
    voice.say("Teacher loaded")
    voice.note("something")
    assert capsys.readouterr() == ("", "note: something\n")
    voice.is_muted = False
    voice.say("Teacher loaded")
    assert capsys.readouterr() == ("Teacher loaded\n", "")


def work(voice):
    """Show a bar of two steps, of which one is done."""
    with voice.bar("working", total=2) as bar:
        bar.update()
        bar.refresh()


def shown_on_a_terminal(voice, monkeypatch):
    """What a terminal shows as stderr of `work`."""
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        work(voice)
        terminal.write("end")
        terminal.flush()
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(ours, 4096)
    os.close(ours)
    return shown.decode()[:-3]


def test_a_bar_is_on_a_terminal_and_vanishes(monkeypatch, capsys):
    shown = shown_on_a_terminal(md.Voice("en"), monkeypatch)
    assert "working" in shown
    assert "1/2" in shown
    assert "\n" not in shown
    assert shown.endswith("\r")  # over which the next line is written
    assert shown_on_a_terminal(quiet_voice(), monkeypatch) == ""
    assert capsys.readouterr().out == ""


def test_no_bar_is_where_stderr_is_no_terminal(capsys):
    """A log file would hold one line of a thousand bars."""
    work(md.Voice("en"))
    assert capsys.readouterr() == ("", "")


NAME = "a\x1b[2Jb\nerror: c\r\x9b\u2028\u202e\ud800d e\u3000é时"
SHOWN = r"a\x1b[2Jb\nerror: c\r\x9b\u2028\u202e\ud800d e" + "\u3000é时"


def test_control_characters_of_names_are_printed_escaped(capsys):
    voice = md.Voice("en")
    voice.say("  {}: {}", NAME, Path(NAME))
    voice.note(f"{NAME}: a note")
    voice.warn("{}", md.Unusable("{}", NAME))
    md.tell_end(md.Message("error: {}", (md.UserError("{}: no", NAME),)), "en")
    captured = capsys.readouterr()
    assert captured.out == f"  {SHOWN}: {SHOWN}\n"
    lines = captured.err.splitlines()
    assert lines == [f"note: {SHOWN}: a note", f"WARNING: {SHOWN}", f"error: {SHOWN}: no"]


def test_an_error_of_several_lines_keeps_them(capsys):
    md.tell_end(md.Message("error: {}", (md.UserError("a\n  b\x1b"),)), "en")
    assert capsys.readouterr().err == "error: a\n  b\\x1b\n"


def test_a_list_under_an_error_has_a_line_for_each_file():
    told = md.in_language(md.listing({NAME: [NAME], "b": ["c"]}), "en")
    assert told == f"\n  {SHOWN}: skipped: {SHOWN}\n  b: skipped: c"


def test_a_bar_shows_its_description_escaped(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with md.Voice("en").bar("a\x1b", total=1) as bar:
        assert bar.desc.startswith(r"a\x1b")


# -- Whole commands in Chinese ---------------------------------------------------------------------

SHORT = "--context_length 64 --prediction_length 16 --device cpu --alpha 0 --save_dir new"
WRONG = (  # command lines of typical mistakes; the places are those of `places_of_mistakes`
    "trian --data_dir {data}",
    "train --data_dir {data} --aplha 1",
    "train --data_dir {data} --alpha x",
    "train --data_dir {data} --alpha 2 --num_epochs 0",
    "train --data_dir {data} --split_ratio 8:1",
    "train --data_dir {data} --d_model 10 --num_heads 3 --device gpu --thousands ab",
    "train --data_dir nowhere --teacher_model ./nowhere --save_dir {file}/x",
    "train --data_dir {data} --patch_size 999 --context_length 64 --resume --save_dir new",
    f"train --data_dir {{good}} {SHORT} --resume --save_dir {{run}} --stride 7",
    f"train --data_dir {{empty}} {SHORT}",
    f"train --data_dir {{data}}/short.csv {SHORT}",
    f"train --data_dir {{data}}/constant.csv {SHORT}",
    f"train --data_dir {{good}} {SHORT} --split_by files --split_ratio 1:99:99",
    "label --list predict",
    f"label --data_dir {{good}} {SHORT.partition(' --alpha')[0]} --label_cache {{empty}}/new"
    " --teacher_model {empty}",
    "evaluate --checkpoint nowhere/best.pt",
    "evaluate --checkpoint {damaged}",
    "evaluate --checkpoint {run} --data_dir {data} --output_dir {file}",
    "evaluate --checkpoint {run} --context_length 5 --prediction_length 16",
    "evaluate --checkpoint {run} --device cuda:99",
    "predict --checkpoint {run} --input nowhere.csv",
    "predict --checkpoint {run} --input {data}/short.csv --output {data}/short.csv",
    "predict --checkpoint {run} --input {data}/short.csv",
    "predict --checkpoint {run} --input {damaged}",
    "predict --checkpoint {empty} --input {data}/short.csv",
    "predict --checkpoint {run} --input {data}/short.csv --encoding nonsense",
    "export --checkpoint {run} --format hub --output {data}",
    "export --checkpoint {run} --format hub --output {file}",
    "export --checkpoint {run} --format onnx --output {data}",
)


@pytest.fixture(scope="module")
def places_of_mistakes(trained, tmp_path_factory):
    """Name -> path of what the command lines of WRONG name."""
    root = tmp_path_factory.mktemp("mistakes")
    for folder in ("data", "empty"):
        (root / folder).mkdir()
    hourly(40).to_csv(root / "data" / "short.csv", index=False)
    hourly(400).assign(value=1.0).to_csv(root / "data" / "constant.csv", index=False)
    (root / "file").write_text("a file")
    (root / "damaged.pt").write_bytes(b"PK\3\4" + bytes(100))
    return {
        "data": root / "data",
        "good": trained / "data",
        "empty": root / "empty",
        "file": root / "file",
        "damaged": root / "damaged.pt",
        "run": trained / "twin",
    }


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_is_told_in_chinese(words, places_of_mistakes, tmp_path, monkeypatch, capsys):
    """Behind "error:", too; what a library says, in brackets, may be English."""
    monkeypatch.chdir(tmp_path)
    argv = words.format(**places_of_mistakes).split() + ["--lang", "zh"]
    assert md.main(argv) == 2
    told = capsys.readouterr().err
    error = told[told.index("错误: ") :]
    without_commands = re.sub(r"python moirai_distill\.py .*", "", error)
    without_libraries = re.sub(r"\([A-Za-z]*Error\(.*?\)\)|\[.*?\]", "", without_commands)
    assert not ENGLISH_CLAUSE.search(without_libraries), error
    for line in without_libraries.splitlines():
        assert HAN.search(line) or not line.strip(), error
