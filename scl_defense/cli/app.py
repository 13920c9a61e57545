"""The group, its lazily imported commands, and the one place where errors become lines and exit codes."""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import click

from scl_defense.errors import PeerFailed, SclDefenseError, UserError, printable
from scl_defense.launcher import launched

# command -> (module, one-line help). A command's module is imported when it runs, not for --help.
COMMANDS = {
    "train": ("scl_defense.cli.train", "Train a network with adversarial examples among its positives."),
    "benchmark": ("scl_defense.cli.benchmark", "Attack a trained checkpoint and report what can be trusted."),
    "agreement": ("scl_defense.cli.agreement", "The same attack of several libraries on the same images."),
    "study": ("scl_defense.cli.study", "Train and attack a grid of methods and seeds; tables, figures, a summary."),
    "generate": ("scl_defense.cli.generate", "Make adversarial examples once and store them for training."),
    "finetune": ("scl_defense.cli.finetune", "Judge a trained encoder by a fixed protocol: SLF, ALF or AFF."),
    "report": ("scl_defense.cli.report", "One page to send to others: of a result, of several, of a study."),
    "export": ("scl_defense.cli.export", "The network as a graph for other programs: torch.export, ONNX."),
    "push": ("scl_defense.cli.push", "Share a checkpoint on the Hugging Face Hub, with a card."),
    "pull": ("scl_defense.cli.pull", "Fetch a checkpoint from the Hugging Face Hub."),
    "plugins": ("scl_defense.cli.plugins", "What is installed and from where; the contract test; a new one."),
    "info": ("scl_defense.cli.info", "What a checkpoint holds."),
    "doctor": ("scl_defense.cli.doctor", "What this installation has, what is missing, what does not fit."),
}
TOGETHER = ("train", "finetune", "benchmark")  # commands that several processes under torchrun run as one
# click 8.2 raises it where 8.1 printed the help by itself; an empty tuple catches nothing.
NO_ARGUMENTS: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


class LazyGroup(click.Group):
    """Knows its commands by name; imports one when it is asked for. Plugins' commands are added the same moment."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*COMMANDS, *self._with_plugins().commands})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            if name not in TOGETHER and launched() is not None:
                raise UserError(f"'{name}' runs in one process; start it without torchrun")
            command: click.Command = import_module(COMMANDS[name][0]).command
            return command
        return self._with_plugins().commands.get(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = self._with_plugins().commands
        rows = [(name, COMMANDS[name][1] if name in COMMANDS else commands[name].get_short_help_str(60))
                for name in self.list_commands(ctx)]  # fmt: skip
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _with_plugins(self) -> "LazyGroup":
        if not self.__dict__.setdefault("_asked", False):
            self.__dict__["_asked"] = True
            from scl_defense.plugins import default_host

            default_host().register_commands(self)
        return self


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from scl_defense import __version__

        click.echo(f"scl-defense {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Adversarial robustness through contrastive learning: train, attack, and say which numbers hold.

    \b
    scl-defense train --generator contrastive-pgd
    scl-defense benchmark runs/RUN/best.pt --attacks fgsm,pgd,cw
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 130/143 stopped by a signal."""
    in_charge = threading.current_thread() is threading.main_thread()
    if in_charge:
        _stops.clear()
        signal.signal(signal.SIGTERM, _stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller has it ignored (nohup)
            signal.signal(signal.SIGINT, _stop)
    code = run(arguments)
    if in_charge:  # it is done, and its exit code says how: there is nothing left to stop
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


class Terminated(KeyboardInterrupt):
    """SIGTERM, answered as Ctrl-C is: nothing is left half-done. (While a network trains, training answers both.)"""


_stops: list[tuple[int, float]] = []  # the signals that asked this run to stop, and when
_ECHO = 10.0  # seconds in which an error may come of one


def _stop(signum: int, frame: Any) -> None:
    # Noted, as the exception may not come out as itself: compiled code that is interrupted (pydantic's, while it is
    # imported) makes an error of its own of it.
    _stops.append((signum, time.monotonic()))
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; errors are one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments  # before or after the command
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        result: Any = cli.main(args=arguments, prog_name="scl-defense", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except NO_ARGUMENTS as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "scl-defense")
        return _fail(error.format_message().replace("\n", " "), 2, debug, f" (see: {command} --help)")
    except (click.Abort, KeyboardInterrupt) as error:  # click makes its own of a KeyboardInterrupt
        return _stopped(debug, isinstance(error, Terminated) or isinstance(error.__cause__, Terminated))
    except PeerFailed as error:  # it is said where it happened
        from scl_defense.runtime import hear_out

        hear_out()
        return error.exit_code
    except SclDefenseError as error:
        if _just_stopped():
            return _stopped(debug)
        return _fail(" ".join(str(error).split()), error.exit_code, debug)
    except BrokenPipeError:  # the reader of a pipe has gone: `... | head`
        sys.stderr.close()
        return 1
    except Exception as error:
        if _just_stopped():
            return _stopped(debug)
        return _fail(
            f"unexpected {type(error).__name__}: {' '.join(str(error).split())} (this is a bug or a broken component; "
            "--debug shows where)",
            1,
            debug,
        )
    except BaseException as error:  # as PyO3's panics are
        if isinstance(error, SystemExit) or not _just_stopped():
            raise
        return _stopped(debug)


def _just_stopped() -> bool:
    """Whether what went wrong now is a stop, not an error of its own, long after one that somebody has answered."""
    return any(time.monotonic() - when < _ECHO for _, when in _stops)


def _stopped(debug: bool, terminated: bool = False) -> int:
    terminated = terminated or any(signum == signal.SIGTERM for signum, _ in _stops)
    return _fail("stopped", 143 if terminated else 130, debug)


def _fail(message: str, code: int, debug: bool, hint: str = "") -> int:
    if debug:
        traceback.print_exc()
    with _one_speaker() as mine:
        if mine:
            click.echo(f"error: {printable(message)}{hint}", err=True)
    return code


def _one_speaker() -> AbstractContextManager[bool]:
    """Of several processes one says what is wrong with all of them."""
    if launched() is None:
        return nullcontext(True)
    from scl_defense.runtime import one_speaker

    return one_speaker()
