"""The command line: its commands, and the one place that turns an error into text and an exit code."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import Exit, TyperException

from trimkv_cli import __version__
from trimkv_cli.commands.table import CommandTable
from trimkv_cli.errors import ClosedPipe, OutOfDeviceMemory, TrimkvError, UsageError, is_out_of_memory
from trimkv_cli.files import can_write
from trimkv_cli.settings import load_settings
from trimkv_cli.streams import drop_stdout, repair_streams, why_not_written
from trimkv_cli.tested import NEWEST, untested
from trimkv_cli.ui.plain import print_error

_EPILOG = """
Exit codes: 0 all done; 1 failed while running; 2 usage, settings or the one input; 3 some of several inputs failed;
4 does not fit, memory or positions; 5 out of device memory; 6 model or gates; 75 stopped on purpose, resumable;
130, 143 interrupted; 141 nobody reads stdout.

Settings, first wins: flags; variables such as TRIMKV_KV_BUDGET; trimkv.toml or [tool.trimkv] of the project;
config.toml in the config folder, beside your templates. `trimkv doctor` shows all folders; without -o nothing is
written elsewhere. There is no telemetry.
"""

app = typer.Typer(
    name="trimkv",
    cls=CommandTable,
    help="Run a local language model inside a memory budget: the cache keeps what its retention gates say will last.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        print(f"trimkv {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version)] = False,
) -> None:
    pass


def command_tree() -> CommandTable:
    """Return the tree of commands with all that they take, for what is written about them."""
    return _command_table().load_all()


def _command_table() -> CommandTable:
    table = typer.main.get_command(app)
    assert isinstance(table, CommandTable)
    return table


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run trimkv on `arguments` (default: the process's own) and exit with the code that cli.md's table gives."""
    repair_streams()
    _prepare_environment()
    signal.signal(signal.SIGTERM, _terminate)
    code = _exit_code(list(sys.argv[1:] if arguments is None else arguments))
    sys.exit(_close_stdout(code))


def _exit_code(arguments: list[str]) -> int:
    try:
        return _invoke(arguments)
    except (BrokenPipeError, ClosedPipe):
        return ClosedPipe.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except TrimkvError as error:
        return _report(error.message, error.hint, error.exit_code)
    except TyperException as error:
        message = error.format_message().replace("Value error, ", "")  # pydantic's, which typer passes on
        return _report(message, _usage_hint(error), error.exit_code)
    except Exception as error:  # noqa: BLE001  # the last line of defence: any fault becomes one line
        return _report_unexpected(error)


def _invoke(arguments: list[str]) -> int:
    command = _command_table()
    if "_TRIMKV_COMPLETE" in os.environ:
        command.main(arguments, prog_name="trimkv")
    try:
        # Not command.main(): that one turns a closed pipe into exit code 1.
        with command.make_context("trimkv", arguments, obj=_settings_for) as context:
            command.invoke(context)
    except Exit as request:
        return request.exit_code
    return 0


def _settings_for(command: Any) -> Mapping[str, Any]:
    """Read the settings for a command; what it does not take itself has all the others loaded, which may."""
    from trimkv_cli.commands.options import KnownSettings

    known = KnownSettings(command, command_tree)
    return load_settings(_working_folder(), os.environ, known, known.check)


def _working_folder() -> Path:
    """Return the folder that the process is in.

    Raises:
        UsageError: it has been deleted, and with it what a relative path means; libraries end the process there.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UsageError("the folder that this was started in is gone", hint="cd into one that is there") from None


def _report(message: str, hint: str | None, code: int) -> int:
    if not message:  # a command group alone has printed its help
        return code
    if os.environ.get("TRIMKV_DEBUG") == "1":
        traceback.print_exc()
    print_error(message, hint)
    return code


def _report_unexpected(error: Exception) -> int:
    if is_out_of_memory(error):
        hint = "lower --max-inflight, --kv-budget or --prefill-chunk"
        return _report("the device is out of memory", hint, OutOfDeviceMemory.exit_code)
    return _report_os_error(error) if isinstance(error, OSError) else _report_fault(error)


def _report_os_error(error: OSError) -> int:
    reason = why_not_written(error)
    if reason is None:
        return _report_fault(error)
    return _report(reason, "send the output to a file on a disk with room for it", TrimkvError.exit_code)


def _report_fault(error: Exception) -> int:
    return _report(f"{type(error).__name__}: {error}", _fault_hint(), TrimkvError.exit_code)


def _fault_hint() -> str:
    """Name the package that may be to blame: one whose form may have changed since it was tested."""
    newer = [name for name in ("transformers", "torch") if name in sys.modules and untested(name)]
    if newer:
        return f"{newer[0]} is newer than trimkv was tested with: pip install {newer[0]}=={NEWEST[newer[0]]}"
    return "TRIMKV_DEBUG=1 shows where this happened"


def _usage_hint(error: TyperException) -> str | None:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context is not None else None


def _terminate(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _close_stdout(code: int) -> int:
    """Flush what is left and return the exit code: another one than `code` when that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
        return code or ClosedPipe.exit_code
    except OSError as error:
        drop_stdout()
        return code or _report_os_error(error)
    return code


def _writable_folder(wanted: Path) -> Path:
    """Return a folder that can be made and written: where `wanted` cannot be, one that is gone with the process.

    torch makes its own at the first import, needed or not, and ends where it cannot.
    """
    if can_write(wanted):
        return wanted
    try:
        folder = Path(tempfile.mkdtemp(prefix="trimkv-"))
    except OSError:  # nothing at all can be written
        return Path(os.sep)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _prepare_environment() -> None:
    """Keep libraries quiet, without telemetry, good neighbours, and their caches in our own folder."""
    from platformdirs import user_cache_path

    cache = _writable_folder(user_cache_path("trimkv"))
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait spinning starve each other on a busy machine
        "TRANSFORMERS_VERBOSITY": "error",
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }.items():
        os.environ.setdefault(name, value)
