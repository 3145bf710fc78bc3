"""
What a user types, without waiting for imports: processes forked from one that has made them.

`python SCRIPT FLAGS` takes five seconds to import torch and transformers; a forked process takes
none. Apart from that it is a process of its own: arguments, folder, screen, signals, exit code.
"""
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

if sys.platform == "linux":
    PROCESSES = multiprocessing.get_context("forkserver")
    PROCESSES.set_forkserver_preload(["reinforce_pp", "transformers.models.llama.modeling_llama",
                                      "transformers.models.gpt2.modeling_gpt2"])
else:  # where a process that has imported torch had better not fork
    PROCESSES = multiprocessing.get_context("spawn")


def start(arguments, cwd, screen, environment=()):
    """What `python ARGUMENTS` starts in the folder `cwd`; its stdout and stderr go to `screen`."""
    arguments = [str(argument) for argument in arguments]
    process = PROCESSES.Process(target=execute, args=(arguments, str(cwd), str(screen),
                                                      dict(environment)))
    process.start()
    return process


def execute(arguments, cwd, screen, environment):
    os.environ.update(environment)
    os.chdir(cwd)
    file = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__")
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def call(*arguments, cwd, code=0):
    """`python ARGUMENTS`, to its end, which must be the exit code `code` -> what it wrote."""
    screen = Path(cwd, ".screen")
    process = start(arguments, cwd, screen)
    process.join(300)
    text = screen.read_text()
    screen.unlink()
    assert process.exitcode == code, text
    assert "Traceback" not in text, text
    return text
