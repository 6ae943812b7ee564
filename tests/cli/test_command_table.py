"""Mistakes in the table of commands, and what starting costs."""

from __future__ import annotations

import subprocess
import sys

from helpers.programs import ENVIRONMENT
from trimkv_cli.app import command_tree
from trimkv_cli.commands.table import ENTRIES


def test_the_table_says_what_the_commands_say() -> None:
    """Catches a help line, a name or a place that has changed in one of two places."""
    tree = command_tree()
    assert [entry.name for entry in ENTRIES] == list(tree.commands)
    for entry in ENTRIES:
        own = tree.commands[entry.name]
        assert own.name == entry.name
        assert " ".join(str(own.help).partition("\n\n")[0].split()) == entry.help


def test_a_list_of_commands_imports_none_and_reading_a_line_no_model() -> None:
    """Catches an import that makes every start dearer."""
    code = (
        "import sys\n"
        "from trimkv_cli.app import main\n"
        "def loads(*line):\n"
        "    try: main(line)\n"
        "    except SystemExit: pass\n"
        "    return {n for n in sys.modules if n.startswith('trimkv_cli.')}\n"
        "plain = {'app', 'commands', 'commands.table', 'errors', 'files', 'settings', 'streams', 'tested'}\n"
        "more = loads('--help') - {f'trimkv_cli.{n}' for n in (*plain, 'ui', 'ui.plain')}\n"
        "assert not more, more\n"
        "parts = {n.split('.')[1] for n in loads('ask', '-b', '1GiB', '--greedy', '--temperature', '1', 'Why?')}\n"
        "assert 'loading' in parts and not parts & {'model', 'plan', 'engine', 'cache', 'jobs', 'chat'}, parts\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, timeout=60, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
