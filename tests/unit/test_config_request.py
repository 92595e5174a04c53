"""The section `[request]`: which destination may be asked for, and what a wrong one is told."""

from pathlib import Path

import pytest

from autobackup.configfile import load
from autobackup.errors import ConfigError

GLANCE = '[[destination]]\nname = "%s"\nstore = "glance"\ncloud = "c"\nproject = "p"\nkey = "barbican"\n'
FOLDER = '[[destination]]\nname = "vault"\nstore = "directory"\npath = "/v"\nkey = "keyfile"\nkeyfile = "/k"\n'


def test_a_destination_in_a_cloud_may_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GLANCE % "owners" + '[request]\ndestination = "owners"\n')
    assert load(tmp_path / "a.toml").request.destination == "owners"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FOLDER + '[request]\ndestination = "vault"\n', 'store = "glance": a request names a project'),
        (GLANCE % "owners" + '[request]\ndestination = "ownerss"\n', "did you mean 'owners'?"),
        ('[request]\ndestination = "owners"\n', "there is no [[destination]]"),
        (GLANCE % ("o" * 32) + f'[request]\ndestination = "{"o" * 32}"\n', "at most 31 letters"),
    ],
)
def test_what_cannot_be_asked_for_is_told_at_its_key(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as told:
        load(file)
    assert str(told.value).startswith(f"{file}: request.destination: ")
    assert words in str(told.value)
