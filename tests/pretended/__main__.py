"""python -m tests.pretended SCRIPT FLAGS: a script on the pretended device, and at its end where the host waited."""

import runpy
import sys

from tests.pretended import library

library.load()

from tests.pretended.device import pretended_cuda  # noqa: E402

sys.argv = sys.argv[1:]
with pretended_cuda() as device:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(f"The host waited for the device {device.waits.total()} times:")
        for (why, where), count in device.waits.most_common():
            print(f"{count:7} {why}: {where}")
