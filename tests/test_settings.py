import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from regd.settings import (
    LEAVES,
    MASK,
    NEVER_DATA,
    AlyxSettings,
    Settings,
    SettingsError,
    check_for_daemon,
    load,
    markdown_table,
    rows,
)

EXAMPLE = Path(__file__).parents[1] / "config" / "regd.yaml"
SECRET = "0f3a9c5e7b1d2f4a6c8e"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("REGD_"):
            monkeypatch.delenv(name)
    for name in ("CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "regd.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return path

    return write


@pytest.fixture
def secret_file(tmp_path, monkeypatch):
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))

    def put(name, text):
        path = folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return path

    return put


def mistakes(make):
    with pytest.raises(SettingsError) as caught:
        make()
    assert str(caught.value).splitlines() == list(caught.value.mistakes)
    return caught.value.mistakes


def mistake(make):
    (line,) = mistakes(make)
    return line


# --- defaults and sources --------------------------------------------------------------------


def test_defaults():
    found = Settings()
    assert found.data_root is None
    assert found.alyx.requests_per_minute == 500
    assert found.register.files is True
    assert found.register.chunk_files == 100
    assert found.watch.ignore == list(NEVER_DATA)
    assert (found.retry.first_s, found.retry.longest_s, found.retry.attempts) == (5, 900, 12)
    assert (found.workers, found.flag, found.log.format) == (4, "create_me.flag", "auto")


def test_state_dir_of_systemd_root_and_others(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert Settings().state_dir == Path("/var/lib/regd")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/rig")
    assert Settings().state_dir == Path("/home/rig/.local/state/regd")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert Settings().state_dir == Path("/home/rig/.local/state/regd")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/rig/state")
    assert Settings().state_dir == Path("/home/rig/state/regd")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
    assert Settings().state_dir == Path("/var/lib/one")
    assert Settings(state_dir="~/here").state_dir == Path("/home/rig/here")


def test_arguments_over_environment_over_secrets_over_file(write, secret_file, monkeypatch):
    monkeypatch.setenv(
        "REGD_CONFIG",
        str(
            write(
                "alyx: {url: 'https://file', username: file, password: file, token: file}\n"
                "register: {chunk_files: 7}\nworkers: 2"
            )
        ),
    )
    secret_file("alyx__token", "secret\n")
    secret_file("regd_alyx__password", "secret\n")
    secret_file("alyx__username", "secret")
    monkeypatch.setenv("REGD_ALYX__USERNAME", "environment")
    monkeypatch.setenv("REGD_ALYX__TOKEN", "environment")
    monkeypatch.setenv("REGD_REGISTER__FILES", "false")
    found = Settings(alyx={"token": "argument"}, workers=3)
    assert found.alyx.token.get_secret_value() == "argument"
    assert found.alyx.username == "environment"
    assert found.alyx.password.get_secret_value() == "secret"
    assert found.alyx.url == "https://file"
    assert (found.register.chunk_files, found.register.files, found.workers) == (7, False, 3)


def test_origins(write, secret_file, monkeypatch):
    path = write("alyx:\n  url: https://file\nregister: {files: no}")
    secret = secret_file("ALYX__Token", "abc")
    monkeypatch.setenv("REGD_REGISTER__USERS", "anna, ben")
    loaded = load(path)
    assert list(loaded.origins) == list(LEAVES)
    assert loaded.origins["alyx.url"] == loaded.origins["register.files"] == str(path)
    assert loaded.origins["alyx.token"] == f"secret file {secret}"
    assert loaded.origins["register.users"] == "environment REGD_REGISTER__USERS"
    assert loaded.origins["workers"] == "default"
    assert loaded.settings.register.users == ["anna", "ben"]


def test_sections_as_arguments():
    found = Settings(alyx=AlyxSettings(url="https://a"), register={"users": ["anna"]})
    assert found.alyx.url == "https://a"
    assert found.register.users == ["anna"]
    assert found.model_dump()["register"]["users"] == ["anna"]


def test_section_as_argument_goes_over_the_environment_key_by_key(monkeypatch):
    monkeypatch.setenv("REGD_ALYX__TIMEOUT_S", "5")
    assert Settings(alyx=AlyxSettings(url="https://a")).alyx.timeout_s == 5


def test_settings_are_immutable():
    found = Settings()
    with pytest.raises(ValidationError):
        found.workers = 3
    with pytest.raises(ValidationError):
        found.alyx.url = "https://a"


@pytest.mark.parametrize(
    ("text", "users"),
    [("anna", ["anna"]), ("anna,ben ,", ["anna", "ben"]), ('["a, b"]', ["a, b"])],
)
def test_lists_from_text(monkeypatch, text, users):
    monkeypatch.setenv("REGD_REGISTER__USERS", text)
    assert Settings().register.users == users


@pytest.mark.parametrize(
    ("text", "versions"),
    [("1.2", "1.2"), (" 1.2 ", "1.2"), ("null", None), ("", None)],
)
def test_versions_from_text(monkeypatch, text, versions):
    monkeypatch.setenv("REGD_REGISTER__VERSIONS", text)
    assert Settings().register.versions == versions


def test_null_and_empty_in_the_environment(monkeypatch):
    monkeypatch.setenv("REGD_ALYX__REQUESTS_PER_MINUTE", "null")
    monkeypatch.setenv("REGD_WORKERS", "")
    assert Settings().alyx.requests_per_minute is None
    assert Settings().workers == 4


@pytest.mark.parametrize("size", [0, 1, None])
def test_md5_for_none_some_or_all(size):
    assert Settings(register={"max_md5_size": size}).register.max_md5_size == size


def test_section_without_keys_and_file_without_settings(write):
    assert load(write("alyx:\n  # url: x\nworkers: 2\n")).settings.workers == 2
    assert load(write("# nothing\n")).settings == Settings()


def test_url_loses_its_slash_and_blanks_are_none(write):
    found = load(write("alyx: {url: ' https://a/b/ ', username: ' '}\nrepository: ''")).settings
    assert (found.alyx.url, found.alyx.username, found.repository) == ("https://a/b", None, None)


def test_what_is_not_a_setting_is_left_alone(secret_file, monkeypatch):
    monkeypatch.setenv("REGD_TEST_ALYX_URL", "https://a")
    monkeypatch.setenv("REGDX", "1")
    secret_file("tls.key", "not ours")
    Settings()


# --- the example and the tables --------------------------------------------------------------


def test_example_loads_and_shows_the_defaults():
    loaded = load(EXAMPLE)
    bare = {row.key: row.value for row in rows(load())}
    changed = {row.key for row in rows(loaded) if row.value != bare[row.key]}
    assert changed == {"data_root", "alyx.url"}


def test_example_names_every_setting():
    text = EXAMPLE.read_text()
    named = {key for key in LEAVES if re.search(rf"^ *(# )?{key.split('.')[-1]}:", text, re.M)}
    assert set(LEAVES) - named == {"alyx.password", "alyx.token"}
    assert "alyx__token" in text


def test_rows_hide_secrets(secret_file, monkeypatch):
    secret_file("alyx__token", SECRET)
    monkeypatch.setenv("REGD_ALYX__PASSWORD", SECRET)
    loaded = load()
    shown = {row.key: row.value for row in rows(loaded)}
    assert list(shown) == list(LEAVES)
    assert shown["alyx.token"] == shown["alyx.password"] == MASK
    assert (shown["alyx.url"], shown["register.files"], shown["settle.quiet_s"]) == (
        "",
        "true",
        "30",
    )
    assert SECRET not in repr(loaded) + str(loaded.settings) + loaded.settings.model_dump_json()


def test_rows_can_be_printed(write):
    path = write('data_root: "/caf\\udce9"')
    (row,) = (row for row in rows(load(path)) if row.key == "data_root")
    assert row.value == "/caf\\udce9"


def test_markdown_table_has_every_setting_with_default_and_meaning():
    head, _, *lines = markdown_table().splitlines()
    assert head == "| key | default | meaning |"
    assert [line.split("`")[1] for line in lines] == list(LEAVES)
    assert "| `workers` | `4` | Sessions worked on at the same time, 1 to 32. |" in lines
    assert not any(line.endswith("|  |") or "None" in line for line in lines)


# --- mistakes --------------------------------------------------------------------------------

FILE_MISTAKES = {
    "wrokers: 3": "line 1: unknown setting wrokers; did you mean workers?",
    "a: 1": "line 1: unknown setting a; remove it (docs/settings.md lists all settings)",
    "\nalyx:\n  tokn: x": "line 3: unknown setting alyx.tokn; did you mean alyx.token?",
    "quiet_s: 3": "line 1: unknown setting quiet_s; did you mean settle.quiet_s?",
    "alyx.url: x": "line 1: write url indented below `alyx:`, not alyx.url",
    "register_: {}": "line 1: unknown setting register_; did you mean register?",
    "1: 2": "line 1: unknown setting 1; remove it (docs/settings.md lists all settings)",
    "alyx: https://a": "line 1: alyx is a section and holds keys, such as alyx.url, not a value; "
    "set these instead",
    "workers: many": "line 1: workers must be a whole number, not 'many'; correct it, or remove it "
    "for the default, 4",
    "workers: yes": "line 1: workers must be a number, not True; correct it, or remove it for the "
    "default, 4",
    "workers: 33": "line 1: workers must be at most 32, not 33; correct it, or remove it for the "
    "default, 4",
    "workers: 0": "line 1: workers must be at least 1, not 0; correct it, or remove it for the "
    "default, 4",
    "workers:": "line 1: workers must be a whole number, not empty; correct it, or remove it for "
    "the default, 4",
    "scan: {every_s: .inf}": "line 1: scan.every_s must be at most 1000000000, not inf; "
    "correct it, or remove it for the default, 600",
    "alyx: {timeout_s: 0}": "line 1: alyx.timeout_s must be more than 0, not 0; correct it, or "
    "remove it for the default, 60",
    "retry: {first_s: 1000}": "line 1: retry.longest_s must be at least retry.first_s; correct it, "
    "or remove it for the default, 900",
    "register: {files: maybe}": "line 1: register.files must be true or false, not 'maybe'; "
    "correct it, or remove it for the default, true",
    "register: {users: [1]}": "line 1: register.users must be a list of texts (put them in "
    "quotes), not [1]; correct it, or remove it for the default, []",
    "register: {users: 1}": "line 1: register.users must be a list, not 1; correct it, or remove "
    "it for the default, []",
    "register: {versions: 1.0}": "line 1: register.versions must be text; "
    'write a number in quotes, as "1.0", not 1.0; correct it',
    "repository: 5": "line 1: repository must be text (put it in quotes), not 5; correct it",
    "data_root: [a]": "line 1: data_root must be a path, not ['a']; correct it",
    "log: {level: loud}": "line 1: log.level must be one of 'debug', 'info', 'warning' or 'error', "
    "not 'loud'; correct it, or remove it for the default, info",
    "flag: a/b": "line 1: flag must be a plain file name, without a folder, not 'a/b'; correct it, "
    "or remove it for the default, create_me.flag",
    "alyx: {ca_file: /no/such}": "line 1: alyx.ca_file must name an existing file, not "
    "'/no/such'; correct it",
    "alyx: {url: alyx.lab}": "line 1: alyx.url must be an http or https address, such as "
    "https://alyx.example.org, not 'alyx.lab'; correct it",
    "alyx: {url: 'https://a:b'}": "line 1: alyx.url must be an http or https address, such as "
    "https://alyx.example.org, not 'https://a:b'; correct it",
    "alyx: {url: 'https://a?b'}": "line 1: alyx.url must end before any ? or #, not 'https://a?b'; "
    "correct it",
    "workers: 1\n\nworkers: 2": "line 3: workers is set a second time (first in line 1); keep one "
    "of the two",
    "alyx: {url: 'https://a', url: 'https://b'}": "line 1: alyx.url is set a second time (first in "
    "line 1); keep one of the two",
}


@pytest.mark.parametrize(("text", "said"), FILE_MISTAKES.items())
def test_mistakes_in_the_file(write, text, said):
    path = write(text)
    assert mistake(lambda: load(path)) == f"{path}, {said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", ", line 1, column 5: is no valid YAML"),
        ("a: b\n c: d", ", line 2, column 3: is no valid YAML"),
        ("- 1", ": must hold settings as `key: value`, not a list"),
        ("just text", ": must hold settings as `key: value`, not a str"),
        (b"repository: caf\xe9", ": is not text in UTF-8 (byte 16); save it as UTF-8"),
        (b"\na: \0", ", line 2: holds a character that no text has; remove it"),
        ("a: !!int ''", ": is no YAML that regd can read"),
        ("[" * 5000, ": is no YAML that regd can read"),
    ],
)
def test_files_that_hold_no_settings(write, text, said):
    path = write(text)
    assert mistake(lambda: load(path)).startswith(f"{path}{said}")


def test_all_mistakes_are_told_at_once(write, monkeypatch):
    monkeypatch.setenv("REGD_FOO", "1")
    path = write("wrokers: 3\nalyx: {tokn: 3}")
    assert len(mistakes(lambda: load(path))) == 3
    monkeypatch.delenv("REGD_FOO")
    path = write("workers: 0\nalyx: {url: 3}\nflag: ''")
    assert len(mistakes(lambda: load(path))) == 3


def test_missing_or_unreadable_file(tmp_path, monkeypatch):
    missing = tmp_path / "missing.yaml"
    said = f"{missing}: cannot be read (No such file or directory); check the path and who may"
    assert mistake(lambda: load(missing)).startswith(said)
    monkeypatch.setenv("REGD_CONFIG", str(missing))
    assert mistake(Settings).startswith(said)
    assert "(Is a directory)" in mistake(lambda: load(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("REGD_WROKERS", "3", "unknown setting wrokers; did you mean workers?"),
        ("REGD_ALYX__TOKN", SECRET, "unknown setting alyx.tokn; did you mean alyx.token?"),
        ("REGD_ALYX_TOKEN", SECRET, "unknown setting alyx_token; did you mean alyx.token?"),
        ("REGD_ALYX", SECRET, "alyx is a section and holds keys, such as alyx.url, not a value; "),
        ("REGD_REGISTER_", "{}", "unknown setting register_; did you mean register?"),
        ("REGD_WORKERS", "many", "workers must be a whole number, not 'many'; correct it, or "),
        ("REGD_REGISTER__USERS", "[a", 'register.users must be a list, such as ["a", "b"], not'),
    ],
)
def test_mistakes_in_the_environment(monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    line = mistake(Settings)
    assert line.startswith(f"environment {name}: {said}")
    assert SECRET not in line


def test_mistakes_in_secret_files(secret_file, monkeypatch, tmp_path):
    path = secret_file("alyx__tokn", SECRET)
    said = "unknown setting alyx.tokn; did you mean alyx.token?"
    assert mistake(Settings) == f"secret file {path}: {said}"
    path.unlink()
    path = secret_file("regd_tokn", SECRET)
    assert mistake(Settings).startswith(f"secret file {path}: unknown setting tokn; did you mean")
    path.unlink()
    path = secret_file("alyx__token", b"\xff")
    assert "one of the secret files is not text in UTF-8" in mistake(Settings)
    path.write_text("two words")
    assert mistake(Settings) == (
        f"secret file {path}: alyx.token must be the token alone, one word without spaces, "
        f"not {MASK}; correct it"
    )
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "missing"))
    assert f"{tmp_path / 'missing'}: cannot be read" in mistake(Settings)


@pytest.mark.parametrize(
    "text",
    [
        f"alyx: {{token: '{SECRET} x'}}",
        f"alyx: {{token: ['{SECRET}']}}",
        f"alyx: {{tokn: '{SECRET}'}}",
        f"alyx: '{SECRET}'",
        f"alyx: ['{SECRET}']",
        f"alyx:\n  password: *{SECRET}",
        f"alyx:\n  password: !{SECRET} x",
        f"alyx:\n  password: '{SECRET}' x",
        f'alyx:\n  password: "\\{SECRET}',
        f"alyx: {{url: 'https://me:{SECRET}@alyx.lab'}}",
        f"alyx: {{url: 'ftp://me:{SECRET}@alyx.lab'}}",
    ],
)
def test_no_mistake_shows_a_secret(write, text):
    path = write(text)
    assert SECRET not in "".join(mistakes(lambda: load(path)))
    with pytest.raises(SettingsError) as caught:
        load(path)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_mistakes_in_arguments():
    assert mistake(lambda: Settings(wrokers=1)).startswith("argument: unknown setting wrokers;")
    assert mistake(lambda: Settings(alyx={"token": 3})) == (
        f"argument: alyx.token must be text (put it in quotes), not {MASK}; correct it"
    )


SCALARS = st.sampled_from(
    [
        "",
        "~",
        "yes",
        "1",
        "-1",
        "1e400",
        ".nan",
        "'\\0'",
        '"\\0"',
        '"\\ud800"',
        "2020-01-01",
        "2020-99-99",
        "!!int ''",
        "&a [*a]",
        "*a",
        "{}",
        "[[]]",
        "{? [1] : 2}",
        "~x",
        "<<",
        "https://[",
        "'https://a:b@c'",
        "!!binary x",
        "!!set {a}",
        "=",
        "\\",
        "|",
        "'",
        "[a, b]",
        "a, b",
        "0x" + "f" * 5000,
        "9" * 5000,
    ]
)
KEYS = st.sampled_from(
    [key.split(".")[-1] for key in LEAVES] + ["alyx", "<<", "1", "~", "x", "? a"]
)
LINES = st.builds("{}{}: {}\n".format, st.sampled_from(["", "", "  "]), KEYS, SCALARS)
LEAF = st.builds(
    "{0[0]}: {{{0[1]}: {1}}}".format,
    st.sampled_from([key.split(".") for key in LEAVES if "." in key]),
    SCALARS,
)


@given(
    content=st.binary()
    | st.text().map(str.encode)
    | LEAF.map(str.encode)
    | st.lists(LINES).map("".join).map(str.encode)
)
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_file_loads_or_is_refused_in_words(write, content):
    path = write(content)
    try:
        loaded = load(path)
    except SettingsError as error:
        refused = error.mistakes
    else:
        "".join(map("".join, rows(loaded))).encode()
        return
    assert refused
    for line in refused:
        line.encode()
        assert line.startswith(str(path))
        assert len(line.splitlines()) == 1
        assert "input_value" not in line
        assert "type=" not in line


# --- the daemon ------------------------------------------------------------------------------


@pytest.fixture
def complete(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    return {
        "data_root": root,
        "state_dir": tmp_path / "state",
        "alyx": {"url": "https://a", "token": "abc"},
    }


def check(**values):
    found = Settings(**values)
    check_for_daemon(found, {"data_root": "FILE", "state_dir": "FILE"})


def test_enough_for_the_daemon(complete):
    check(**complete)
    alyx = {"url": "https://a", "username": "a", "password": "b"}
    check(**complete | {"alyx": alyx})


def test_nothing_set_for_the_daemon():
    lines = mistakes(check)
    assert [line.split()[0] for line in lines] == ["data_root", "alyx.url", "alyx.token"]
    assert "REGD_DATA_ROOT" in lines[0]
    assert "REGD_ALYX__URL" in lines[1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data_root": "relative"}, "FILE: data_root must begin with /, not 'relative'"),
        ({"data_root": "/no/such"}, "FILE: data_root must be an existing folder, not '/no/such'"),
        ({"data_root": __file__}, "FILE: data_root must be an existing folder"),
        ({"state_dir": "relative"}, "FILE: state_dir must begin with /, not 'relative'"),
        ({"alyx": {"token": "a"}}, "alyx.url is not set anywhere: give the address of Alyx"),
        ({"alyx": {"url": "http://a", "username": "a"}}, "alyx.password is not set anywhere"),
        ({"alyx": {"url": "http://a", "password": "a"}}, "alyx.username is not set anywhere"),
        ({"alyx": {"url": "http://a"}}, "alyx.token is not set anywhere: give a token, or"),
    ],
)
def test_what_the_daemon_refuses(complete, changed, said):
    assert mistake(lambda: check(**complete | changed)).startswith(said)


def test_journal_inside_the_data_is_refused_through_links_too(complete, tmp_path):
    inside = complete["data_root"] / "state"
    link = tmp_path / "link"
    link.symlink_to(complete["data_root"])
    for state in (complete["data_root"], inside, link / "deeper"):
        line = mistake(lambda state=state: check(**complete | {"state_dir": state}))
        assert line.startswith(f"FILE: state_dir '{state}' must be outside data_root")


# --- the process -----------------------------------------------------------------------------


def test_import_is_light_and_silent():
    code = (
        "import sys, regd.settings, regd.logs; "
        "print({'pandas', 'numpy', 'requests', 'boto3', 'numba', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")
