"""Writes the chapter on the API from the comments of the protos: python3 api.py PROTO_FOLDER > src/api.md."""

import pathlib
import re
import sys

FILES = (
    "diffusion_service", "template", "sampling", "deadline", "event", "resume", "scoring", "model_reference",
    "model_service", "server_service",
)
OPENS = re.compile(r"(message|service|enum|oneof) (\w+) \{(\})?")
RPC = re.compile(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\);")
FIELD = re.compile(r"(?:(optional|repeated) )?([\w.]+) (\w+) = (\d+);")
VALUE = re.compile(r"([A-Z_0-9]+) = (\d+);")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def chapter(source: str) -> list[str]:
    """The chapter of one file: its services, messages and enums, each with its comment."""
    lines, comment, nesting, rows = [], [], [], 0
    for line in map(str.strip, source.splitlines()):
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
            continue
        said, comment = " ".join(comment), []
        if opened := OPENS.match(line):
            kind, name, closed = opened.groups()
            if kind != "oneof":
                lines += ["", f"### {name}", "", cell(said)]
                rows = 0
            if not closed:
                nesting.append(kind)
        elif line == "}":
            nesting.pop()
        elif rpc := RPC.match(line):
            name, asked, stream, answered = rpc.groups()
            lines += ["", f"**{name}**({asked}) returns {'a stream of ' if stream else ''}{answered}: {cell(said)}"]
        elif nesting and (row := FIELD.match(line) or VALUE.match(line)):
            if rows == 0:
                lines += ["", "| | type | |", "|---|---|---|"]
            rows += 1
            if row.re is FIELD:
                label, kind, name, _ = row.groups()
                kind = f"{label} {kind}" if label else kind
                kind = f"one of: {kind}" if nesting[-1] == "oneof" else kind
            else:
                name, kind = row[1], row[2]
            lines.append(f"| `{name}` | {kind} | {cell(said)} |")
    return lines


def main() -> None:
    folder = pathlib.Path(sys.argv[1]) / "denoised/v1"
    print("# The API\n\ngRPC, package `denoised.v1`; written from the comments of `proto/denoised/v1`.")
    for name in FILES:
        print(f"\n## {name.replace('_', ' ')}")
        print("\n".join(chapter((folder / f"{name}.proto").read_text())))


if __name__ == "__main__":
    main()
