"""How bash completes the command: the script that it loads, and what that script asks.

This module owns both ends. It promises that identities are completed too: bash takes words apart at
`:` and `=`, so the command is given its line as it stands, and bash is given back only what stands
behind the last of them. It may not know any command.
"""

from __future__ import annotations

import os
from typing import Final

from click.shell_completion import (
    CompletionItem,
    ShellComplete,
    add_completion_class,
    split_arg_string,
)

__all__ = ["register"]

SCRIPT: Final = """\
%(complete_func)s() {
    local line=${COMP_LINE:0:COMP_POINT} word before= kind value
    word=${line##*[[:space:]]}
    if [[ $word == -*=* ]]; then word=${word#*=}; fi
    # What bash replaces begins behind the colon.
    if [[ $COMP_WORDBREAKS == *:* ]]; then before=${word%%"${word##*:}"}; fi
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$before"}") ;;
        esac
    done < <(COMP_LINE=$line %(complete_var)s=bash_complete "$1" 2>/dev/null)
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(ShellComplete):
    name = "bash"
    source_template = SCRIPT

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ.get("COMP_LINE", "")
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1].isspace() else ""
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{item.value}"


def register() -> None:
    """Have click complete in bash so."""
    add_completion_class(_Bash)
