"""Compare the documentation with the parser: print what differs, a line each; exit code 1 if so.

    python .ci/check_docs.py

- Every flag stands in a table of docs/guide.md, section "Flags", with its default; and the reverse.
- Every flag that README.md, README.zh.md or docs/guide.md mentions exists.
- Every command line of moirai_distill.py that they show is one that its parser takes.

It is no test: who edits a default in the script should not see a test fail, but the row to edit.
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import moirai_distill as md  # noqa: E402

GUIDE = "docs/guide.md"
PAGES = ("README.md", "README.zh.md", GUIDE)
ANY = "any command"  # a row of a table that names none
# What a table says of a default that is no value.
WORDS = {
    "off": False,
    "–": None,
    "as in the run": None,
    "the first run's folder": None,
    "beside the checkpoint": None,
    "from the locale": md.language_of_locale(),
}


def flags_of_commands():
    """command -> flag -> its default, as it is typed in the script."""
    parser = md.build_parser(demo=False)
    (commands,) = [action for action in parser._actions if action.dest == "command"]
    found = {}
    for command, own_parser in commands.choices.items():
        found[command] = {}
        for action in own_parser._actions:
            if action.dest != "help":
                found[command][f"--{action.dest}"] = action.default
    return found


# -- The tables of the guide -----------------------------------------------------------------------


def table_rows(text):
    """(line number, first cell, second cell) of the rows of all tables in the section "Flags"."""
    is_inside = False
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("## "):
            is_inside = line == "## Flags"
        if is_inside and line.startswith("|") and "`--" in line:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.append((number, cells[0], cells[1]))
    return rows


def documented_flags(text):
    """((command or ANY, flag) -> (line number, default as it is written), problems)."""
    found = {}
    problems = []
    for number, first, second in table_rows(text):
        command, flags = ANY, first
        if ": " in first:
            command, flags = first.split(": ")
        names = re.findall(r"`(--\w+)`", flags)
        written = second.split(", ")
        if len(names) != len(written):
            problems.append(f"{GUIDE}:{number}: {len(names)} flags, {len(written)} defaults")
            continue
        for name, default in zip(names, written, strict=True):
            if (command, name) in found:
                problems.append(f"{GUIDE}:{number}: {name} stands in another row, too")
            found[command, name] = (number, default)
    return found, problems


def is_default(written, default):
    """Whether a table's words for a default say what it is."""
    if written in WORDS:
        meant = WORDS[written]
        return type(meant) is type(default) and meant == default
    text = written.strip("`")
    if isinstance(default, list):
        return text == " ".join(default)
    if isinstance(default, int | float) and not isinstance(default, bool):
        with contextlib.suppress(ValueError):
            return float(text) == default
    return text == default


def differences_of_tables(text, flags):
    """What the tables and the parser do not agree on."""
    documented, problems = documented_flags(text)
    for command, defaults in flags.items():
        for name, default in defaults.items():
            row = documented.get((command, name)) or documented.get((ANY, name))
            if row is None:
                problems.append(f"{GUIDE}: {name} of {command} stands in no table")
                continue
            number, written = row
            may_inherit = command in ("evaluate", "predict") and name in flags["train"]
            is_inherited = may_inherit and default is None
            if not is_inherited and not is_default(written, default):
                problems.append(
                    f"{GUIDE}:{number}: the default of {name} is {default!r}, not {written}"
                )
    for (command, name), (number, _) in documented.items():
        having = [own for own, defaults in flags.items() if name in defaults]
        if not having:
            problems.append(f"{GUIDE}:{number}: no command has {name}")
        elif command not in (ANY, *having):
            problems.append(f"{GUIDE}:{number}: {command} has no {name}")
    return problems


# -- What the pages mention and show ---------------------------------------------------------------


def unknown_flags(page, text, flags):
    """Flags that a page mentions and no command has; those of the benchmarks are their own."""
    known = {"--help"}.union(*flags.values())
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if "benchmarks/" in line:
            continue
        for name in re.findall(r"(?<![\w-])--\w[\w-]*", line):
            if name not in known:
                problems.append(f"{page}:{number}: no command has {name}")
    return problems


def command_lines(text):
    """(line number, words) of the command lines of the script, in code blocks and in the text."""
    texts = []  # (where it begins, code)
    for block in re.finditer(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        texts.append((block.start(1), block[1]))
    for span in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        texts.append((span.start(1), span[1]))

    found = []
    for start, code in texts:
        joined = code.replace("\\\n", "  ")  # so that no character moves
        for line in re.finditer(r"\bpython moirai_distill\.py\b(.*)", joined):
            number = text.count("\n", 0, start + line.start()) + 1
            found.append((number, shlex.split(line[1].partition("&&")[0], comments=True)))
    return found


def parse_problem(words):
    """Why the parser does not take the words of a command line; empty where it does."""
    if not words or words[0] not in md.COMMANDS:
        words = ["train", *words]
    parser = md.build_parser(demo="--demo" in words)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args, unknown = parser.parse_known_args(words)
    except SystemExit:  # --help
        return ""
    except md.UserError as error:
        return str(error)
    problems = [md.tell_unknown(word, args) for word in unknown] + md.check_ranges(args)
    return "; ".join(map(str, problems))


def main():
    flags = flags_of_commands()
    problems = []
    count = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        if page == GUIDE:
            problems += differences_of_tables(text, flags)
        problems += unknown_flags(page, text, flags)
        for number, words in command_lines(text):
            count += 1
            problem = parse_problem(words)
            if problem:
                problems.append(f"{page}:{number}: {shlex.join(words)}: {problem}")
    for problem in dict.fromkeys(problems):  # once, also where two commands have the flag
        print(problem)
    if not problems:
        names = set().union(*flags.values())
        print(f"{len(names)} flags and {count} command lines: documentation and parser agree")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
