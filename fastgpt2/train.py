"""The command `python -m fastgpt2.train`, and nothing to import: the package's attribute of this name is the function.

Importing a submodule binds it as an attribute of its package, so this module would hide the function.
"""

if __name__ == "fastgpt2.train":
    raise ImportError("fastgpt2.train is a command (python -m fastgpt2.train); in Python: from fastgpt2 import train")

if __name__ == "__main__":
    from fastgpt2 import signals

    # Before the slow imports, so that a signal is answered while they last.
    signals.handle(signals.end_at_once)

    from fastgpt2.command import main
    from fastgpt2.console import run_command

    run_command(main)
