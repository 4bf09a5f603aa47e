"""What commands print, on the pages: python docs/printed.py README.md runs them again.

A block ```text below <!-- printed by: COMMAND --> is what COMMAND prints.
"""

import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"(<!-- printed by: (.+?) -->\n```text\n).*?(^```$)", re.DOTALL | re.MULTILINE)


def printed(page: str) -> str:
    """The page with every block replaced; SystemExit where a command fails."""

    def run(block: re.Match) -> str:
        done = subprocess.run(block[2], shell=True, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{block[2]}: {done.stderr}")
        lines = [line.rstrip() for line in done.stdout.splitlines()]
        return block[1] + "\n".join(lines).strip("\n") + "\n" + block[3]

    return BLOCK.sub(run, page)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(printed(file.read_text(encoding="utf-8")), encoding="utf-8")
