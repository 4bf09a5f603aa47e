"""`python -m camera export FROM TO`: a compressed checkpoint as a plain native one."""

import argparse

from camera import CameraError, export


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python -m camera", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("export", help="write a native checkpoint of uniform width")
    command.add_argument("checkpoint", help="folder of a compressed checkpoint")
    command.add_argument("out", help="folder to write; must not exist")
    command.add_argument("--width-multiple", type=int, default=8)
    arguments = parser.parse_args()
    try:
        export(arguments.checkpoint, arguments.out, arguments.width_multiple)
    except CameraError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{arguments.out}: native, uniform width")


if __name__ == "__main__":
    main()
