"""Checks the documents against the checkout: `make docs-check`.

Every Markdown file that git tracks, or would. Links, their anchors and backticked paths lead somewhere, the tree in
README.md lists what is there and leaves no module out, Python blocks compile, and every verb, option and make target in
a shell block exists. Findings are printed as `file:line: what`; exit code 1 if any.
"""

import doctest
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "dynadepth"
NOT_KEPT = {".venv", "build", "demo-output", "dist", "runs"}
"""First folders of paths that exist only after a command has run."""

FENCE = re.compile(r"^\s*(```+)\s*(\S*)")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)+/?|[\w.-]+\.(?:md|toml|txt|ya?ml)")
HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*")
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


@dataclass(frozen=True)
class Block:
    """One fenced code block: its language, the number of its first line, its text."""

    language: str
    line: int
    text: str


def split(text: str) -> tuple[list[tuple[int, str]], list[Block]]:
    """The prose as numbered lines, and the fenced blocks."""
    prose: list[tuple[int, str]] = []
    blocks: list[Block] = []
    fence, language, start, body = "", "", 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        found = FENCE.match(line)
        if fence:
            if line.strip() == fence:
                blocks.append(Block(language, start, textwrap.dedent("\n".join(body))))
                fence = ""
            else:
                body.append(line)
        elif found:
            fence, language, start, body = found[1], found[2], number + 1, []
        else:
            prose.append((number, line))
    if fence:
        blocks.append(Block("unclosed", start, ""))
    return prose, blocks


def exists(path: str, *bases: Path) -> bool:
    """Whether `path`, which may hold `*`, is there under one of `bases`."""
    return any(any(base.glob(path.rstrip("/"))) if "*" in path else (base / path).exists() for base in bases)


@cache
def anchors(path: Path) -> frozenset[str]:
    """What a link into this document may name: its headings, as GitHub writes them; equal ones are numbered."""
    found: dict[str, int] = {}
    names = set()
    for _, line in split(path.read_text(encoding="utf-8"))[0]:
        if heading := HEADING.fullmatch(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            names.add(f"{name}-{found[name]}" if name in found else name)
            found[name] = found.get(name, 0) + 1
    return frozenset(names)


def check_prose(prose: list[tuple[int, str]], document: Path) -> Iterator[tuple[int, str]]:
    folder = document.parent
    for number, line in prose:
        for target in LINK.findall(CODE_SPAN.sub("", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            led = folder / path if path else document
            if not led.exists():
                yield number, f"the link leads nowhere: {target}"
            elif anchor and led.suffix == ".md" and anchor not in anchors(led):
                yield number, f"the link names no heading there: {target}"
        for span in CODE_SPAN.findall(line):
            path = re.split(r"::|#|:\d", span)[0]
            if not PATH.fullmatch(path) or path.split("/")[0] in NOT_KEPT:
                continue
            # `owner/name` of a model is no path: one counts when its first folder is ours.
            ours = "/" not in path or exists(path.split("/")[0], ROOT, PACKAGE, folder)
            if ours and "*" not in path.split("/")[0] and not exists(path, ROOT, PACKAGE, folder):
                yield number, f"no such file: {path}"


def check_tree(block: Block) -> Iterator[tuple[int, str]]:
    """A block whose first line is a folder of ours is a tree: one path a line, indented, then what it is for.

    A folder of the package that has lines below it names all its modules and folders there.
    """
    parents: list[tuple[int, Path]] = []
    listed: dict[Path, tuple[int, set[str]]] = {}
    for number, line in enumerate(block.text.splitlines(), block.line):
        found = re.match(r"([\s│├└─]*)([\w.*-]+(?:/[\w.*-]+)*/?)(?=\s{2,}|\s+#|\s*$|(?<=\.py)\s)", line)
        if found:
            indent = len(found[1])
            parents = [(depth, path) for depth, path in parents if depth < indent]
            base = parents[-1][1] if parents else ROOT
            if not exists(found[2], base):
                yield number, f"the tree lists what is not there: {(base / found[2]).relative_to(ROOT)}"
            elif base.is_relative_to(PACKAGE):
                listed[base][1].add(found[2].rstrip("/"))
            parents.append((indent, base / found[2]))
            listed[base / found[2]] = (number, set())
    for folder, (number, names) in listed.items():
        kept = {path.name for path in folder.glob("*.py") if not path.name.startswith("__")}
        kept |= {path.parent.name for path in folder.glob("*/__init__.py")}
        if names:
            yield from ((number, f"the tree leaves out {(folder / n).relative_to(ROOT)}") for n in sorted(kept - names))


def check_python(block: Block) -> Iterator[tuple[int, str]]:
    code = doctest.script_from_examples(block.text) if ">>>" in block.text else block.text
    try:
        compile(code, "block", "exec")
    except SyntaxError as error:
        yield block.line + (error.lineno or 1) - 1, f"the Python block does not compile: {error.msg}"


@cache
def help_of(*verbs: str) -> str | None:
    """What `dynadepth VERB... --help` prints, unwrapped; None where it fails."""
    command = [str(Path(sys.executable).parent / "dynadepth"), *verbs, "--help"]
    wide = os.environ | {"COLUMNS": "240", "TERMINAL_WIDTH": "240", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, env=wide, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def check_command(words: list[str]) -> Iterator[str]:
    """`words` is one command; only ours and make are looked at."""
    if words[:1] == ["make"]:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in words[1:]:
            if re.fullmatch(r"[a-z-]+", word) and not re.search(rf"^{word}:", makefile, re.M):
                yield f"the Makefile has no target {word}"
    if not words or Path(words[0]).name != "dynadepth":
        return
    verbs: tuple[str, ...] = ()
    for word in words[1:]:  # a word is a verb for as long as the help so far lists commands
        if word.startswith("-") or "Commands" not in (help_of(*verbs) or ""):
            break
        verbs += (word,)
    known = help_of(*verbs)
    if known is None:
        yield f"`{' '.join(('dynadepth', *verbs))} --help` fails"
        return
    options = [word.partition("=")[0] for word in words[1:] if OPTION.fullmatch(word.partition("=")[0])]
    for option in sorted(set(options) - set(OPTION.findall(known)) - {"--help"}):
        yield f"`{' '.join(('dynadepth', *verbs))}` has no option {option}"


def check_shell(block: Block) -> Iterator[tuple[int, str]]:
    # A continued line becomes one, with its newlines after it so that the numbers stay right.
    joined = re.sub(r"(?:.*\\\n)+.*", lambda m: m[0].replace("\\\n", " ") + "\n" * m[0].count("\\\n"), block.text)
    for number, line in enumerate(joined.splitlines(), block.line):
        prompt = re.match(r"\s*\$ ", line)
        if block.language == "console" and not prompt:
            continue  # what the command printed
        try:
            words = shlex.split(re.sub(r"([|;&]+)", r" \1 ", line[prompt.end() if prompt else 0 :]), comments=True)
        except ValueError:
            continue  # half of a text in quotes
        command: list[str] = []
        for word in [*words, ";"]:
            if re.fullmatch(r"[|;&]+", word):
                yield from ((number, problem) for problem in check_command(command))
                command = []
            elif command or not re.match(r"\w+=", word):  # VARIABLE=value before a command is not its name
                command.append(word)


def check_document(path: Path) -> Iterator[tuple[int, str]]:
    prose, blocks = split(path.read_text(encoding="utf-8"))
    yield from check_prose(prose, path)
    for block in blocks:
        first = block.text.split(maxsplit=1)[:1]
        if block.language == "unclosed":
            yield block.line - 1, "this code block is never closed"
        elif block.language in ("python", "py", "pycon"):
            yield from check_python(block)
        elif block.language in ("sh", "bash", "shell", "console"):
            yield from check_shell(block)
        elif path.name == "README.md" and first and first[0].endswith("/"):
            yield from check_tree(block)


def tracked() -> list[Path]:
    """Markdown files that git tracks, or would, and those that must be there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"git tells which documents there are, and failed: {done.stderr.strip()}")
    names = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "PAPERS.md", *done.stdout.splitlines()}
    return [ROOT / name for name in sorted(names)]


def main() -> int:
    documents = tracked()
    problems = 0
    for path in documents:
        name = path.relative_to(ROOT)
        findings = check_document(path) if path.exists() else iter([(1, "this document is missing")])
        for number, problem in findings:
            print(f"{name}:{number}: {problem}")
            problems += 1
    print(f"{len(documents)} documents, {problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
