"""config."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument, Context, Option

from ckptvcs.cli import render
from ckptvcs.cli.context import JsonOption, open_repo
from ckptvcs.errors import InvalidInputError
from ckptvcs.repo import Repo


def config(
    context: Context,
    key: Annotated[str | None, Argument(metavar="[KEY]", help="setting")] = None,
    value: Annotated[str | None, Argument(metavar="[VALUE]", help="new value")] = None,
    unset: Annotated[bool, Option("--unset", help="restore the default")] = False,
    user: Annotated[
        bool, Option("--user", help="use your own settings for all repositories")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List, read or change settings."""
    if unset and (key is None or value is not None):
        raise InvalidInputError("--unset requires KEY and no VALUE")
    changed = key if value is not None or unset else None
    if user:
        found, origins = _of_user(key, changed, value)
    else:
        found, origins = _of_repository(open_repo(context), key, changed, value)
    if json:
        render.as_json(found | {"from": {name: origins[name] for name in found}})
    elif key is not None:
        render.data(*map(str, found.values()))
    else:
        rows = [[name, str(setting), origins[name]] for name, setting in found.items()]
        render.table([["setting", "value", "from"], *rows])


def _of_user(
    key: str | None, changed: str | None, value: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Change a setting of the user, and return those that are set, and where they come from."""
    if changed is not None:
        Repo.configure_user(changed, value)
    found: dict[str, Any] = dict(Repo.user_settings())
    if key is not None:
        if changed is None and key not in found:
            raise InvalidInputError(
                f"your own settings have no '{key}'",
                hint=f"set it with 'ckpt config --user {key} VALUE'",
            )
        found = {name: found[name] for name in found if name == key}
    return found, dict.fromkeys(found, "user")


def _of_repository(
    repo: Repo, key: str | None, changed: str | None, value: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Change a setting of the repository, and return all or one, and where they come from."""
    if changed is not None:
        repo.configure(changed, value)
        if changed == "keep-best" and value:
            _warn_of_unknown(repo, value.partition(":")[0])
    found = repo.settings() if key is None else {key: repo.setting(key)}
    return dict(found), repo.setting_origins()


def _warn_of_unknown(repo: Repo, metric: str) -> None:
    """Say that no commit has a metric, which may be misspelled."""
    logged = repo.log(all_branches=True)
    if logged and not any(metric in entry.metrics for entry in logged):
        names = sorted({name for entry in logged for name in entry.metrics})
        known = f"; known metrics: {', '.join(map(render.printable, names))}" if names else ""
        render.talk(f"note: no commit has the metric '{render.printable(metric)}'{known}")
