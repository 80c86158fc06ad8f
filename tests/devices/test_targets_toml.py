from pathlib import Path

import pytest

from toolchain.devices.targets_toml import (
    BundleSettings,
    LocalSettings,
    SshSettings,
    load_targets,
    named_target,
)
from toolchain.errors import RecipeError, StorageError
from toolchain.targets import is_target

WHOLE = """
[pi5]
transport = "ssh"
host = "fe80::1%eth0"
user = "pi"
port = 2222
ssh_config = "keys/config"
python = "~/venv/bin/python"
folder = "~/measure"
threads = 4
affinity = [0, 1]

[laptop]
transport = "local"
runtime = "eager"

[vault]
transport = "bundle"
"""


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def write(text, path="targets.toml"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return Path(path)


def test_every_key_is_read_and_the_rest_has_defaults(tmp_path):
    found = load_targets(write(WHOLE, tmp_path / "my.toml"))
    pi5 = found["pi5"]
    assert isinstance(pi5, SshSettings)
    assert (pi5.runtime, pi5.host, pi5.user, pi5.port) == ("ort-cpu", "fe80::1%eth0", "pi", 2222)
    assert (pi5.threads, pi5.affinity) == (4, (0, 1))
    assert pi5.ssh_config == tmp_path / "keys/config", "relative to the file, not to the current folder"
    assert found["laptop"] == LocalSettings(transport="local", runtime="eager")
    assert found["vault"] == BundleSettings(transport="bundle", runtime="ort-cpu", threads=1)


def test_the_nearer_file_wins_name_by_name(tmp_path):
    write('[a]\ntransport = "local"\nthreads = 7\n[b]\ntransport = "local"\n', tmp_path / "config/slimvit/targets.toml")
    assert set(load_targets()) == {"a", "b"}
    write('[a]\ntransport = "local"\nthreads = 2\n[c]\ntransport = "bundle"\n')
    assert {name: settings.threads for name, settings in load_targets().items()} == {"a": 2, "b": 1, "c": 1}
    assert set(load_targets(write('[d]\ntransport = "bundle"\n', tmp_path / "only.toml"))) == {"d"}


def test_names_are_built_in_or_of_the_file_or_refused():
    assert load_targets() == {}
    assert named_target("ort-cpu") == LocalSettings(transport="local")
    assert named_target("trt-rtx").runtime == "trt-rtx"
    write('[pi5]\ntransport = "ssh"\nhost = "pi5.local"\n')
    assert named_target("pi5").host == "pi5.local"
    with pytest.raises(RecipeError, match="did you mean 'pi5'"):
        named_target("pi")
    with pytest.raises(RecipeError, match=r"known targets: ort-cpu, .*pi5.*targets\.toml"):
        named_target("zzzzzz")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[pi]\ntransport = "ssh"\nhost = "-oProxyCommand=reboot"\n', "pi.host.*not starting with a dash"),
        ('[pi]\ntransport = "ssh"\nhost = "pi; reboot"\n', "pi.host"),
        ('[pi]\ntransport = "ssh"\nhost = "user:secret@pi"\n', "pi.host"),
        ('[pi]\ntransport = "ssh"\nhost = ""\n', "pi.host"),
        ('[pi]\ntransport = "ssh"\nhost = "pi"\nuser = "-l root"\n', "pi.user"),
        ('[pi]\ntransport = "ssh"\nhost = "pi"\npython = "-c"\n', "pi.python"),
        ('[pi]\ntransport = "ssh"\nhost = "pi"\nfolder = "a\\nb"\n', "pi.folder"),
        ('[pi]\ntransport = "ssh"\nhost = "pi"\nport = 0\n', "pi.port"),
        ('[pi]\ntransport = "ssh"\nhost = "pi"\nport = "22"\n', "pi.port"),
        ('[pi]\ntransport = "ssh"\nhost = "pi"\nthread = 2\n', "pi.thread is unknown.*did you mean 'threads'"),
        ('[pi]\ntransport = "ssh"\nhost = "pi"\npassword = "x"\n', "pi.password is unknown"),
        ('[pi]\ntransport = "ssh"\nhost = "pi"\nruntime = "eager"\n', "the device runner has no runtime 'eager'"),
        ('[pi]\ntransport = "ssh"\nhost = "pi"\naffinity = []\n', "pi.affinity"),
        ('[pi]\ntransport = "ssh"\n', "pi.host.*required"),
        ('[pi]\ntransport = "bundle"\nhost = "pi"\n', "pi.host is unknown for transport 'bundle'"),
        ('[pi]\ntransport = "local"\nruntime = "ort-gpu"\n', "'ort-gpu' is no runtime"),
        ('[pi]\nhost = "pi"\n', "pi.transport is None; expected 'local', 'ssh' or 'bundle'"),
        ('[pi]\ntransport = "telnet"\n', "pi.transport is 'telnet'"),
        ('["-x"]\ntransport = "local"\n', "'-x' is no name"),
        ('[ort-cpu]\ntransport = "local"\n', "built-in"),
        ("pi = 3\n", "expected a table"),
        ("[pi\n", "not valid TOML"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(text, words):
    with pytest.raises(RecipeError, match=f"targets.toml.*{words}"):
        load_targets(write(text))


def test_a_file_that_is_named_must_be_there(tmp_path):
    with pytest.raises(StorageError, match=r"gone\.toml"):
        load_targets(tmp_path / "gone.toml")


@pytest.mark.parametrize("name", ["trt+graph", "ort-cuda+graph+transfers", "trt-rtx"])
def test_every_mode_of_a_gpu_can_be_named(name):
    assert is_target(name)
    assert named_target(name).runtime == name
    assert load_targets(write(f'[box]\ntransport = "local"\nruntime = "{name}"\n'))["box"].runtime == name
