"""python -m tests.benchmarks.roofline: see command.py. The pretended device is loaded before torch is."""

from tests.pretended import library

if __name__ == "__main__":
    library.load()
    from tests.benchmarks.roofline.command import main

    main()
