"""python -m tests.pretended SCRIPT FLAGS: a script on the pretended device, and at its end where the host waited."""

import runpy
import sys
from unittest.mock import patch

from tests.pretended import library

library.load()

from tests.pretended.device import pretended_cuda  # noqa: E402


def main(arguments: list[str]) -> None:
    """Run a script with its flags."""
    with patch.object(sys, "argv", arguments), pretended_cuda() as device:
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        finally:
            print(f"The host waited for the device {device.waits.total()} times:")
            for (why, where), count in device.waits.most_common():
                print(f"{count:7} {why}: {where}")


if __name__ == "__main__":
    main(sys.argv[1:])
