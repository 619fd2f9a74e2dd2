"""What survives a crash: runs that were damaged, that came from a stranger, or whose disk was full."""
import json
import os
import shutil
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import PLAN, SIGNS, TINY, Walk, assert_same_run, finish, flip, line, start, toy

import bdpo_lit.offline.training as training
from bdpo_lit.offline.data import scale_reward
from bdpo_lit.offline.training import (
    DamagedCheckpoint,
    RunError,
    Training,
    append_json,
    export_policy,
    load_agent,
    load_checkpoint,
    read_column,
    read_config,
    read_scoreboard,
    save_checkpoint,
    scoreboard,
    show_scoreboard,
    watch,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    "A run that nobody touched, with its table."
    t = finish(tmp_path_factory.mktemp("through") / "run")
    scoreboard(t, episodes=2)
    return t


@pytest.fixture(scope="module")
def stopped_at(tmp_path_factory):
    "The same run, stopped at update 24 of the main loop; it was saved before at 21."
    with closing(start(folder := tmp_path_factory.mktemp("stopped") / "run").run()) as loop:
        for p in loop:
            if (p.phase, p.step) == ("train", 24): break
    return folder


@pytest.fixture
def stopped(stopped_at, tmp_path): return Path(shutil.copytree(stopped_at, tmp_path / "run"))


def steps(path): return sum(load_checkpoint(path)["steps"].values())


# Checkpoints

@pytest.mark.parametrize("name", ["last.pt", "best.pt", "gaussian.pt"])
def test_every_flipped_bit_and_every_cut_is_noticed(name, through, tmp_path):
    good, rng = (through.dir / name).read_bytes(), np.random.default_rng(0)
    path = tmp_path / name
    for byte in {*range(8), *range(len(good) - 80, len(good)), *rng.integers(len(good), size=200).tolist()}:
        path.write_bytes(good)
        flip(path, byte, int(rng.integers(8)))
        with pytest.raises(DamagedCheckpoint, match=name): load_checkpoint(path)
    for size in rng.integers(len(good), size=50):
        path.write_bytes(good[:size])
        with pytest.raises(DamagedCheckpoint, match="cut short"): load_checkpoint(path)
    path.write_bytes(good + b"\n")
    with pytest.raises(DamagedCheckpoint): load_checkpoint(path)
    path.write_bytes(good)
    load_checkpoint(path)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_last_goes_on_from_the_one_before_to_the_bit(damage, stopped, through, capsys):
    assert (steps(stopped / "last.pt"), steps(stopped / "previous.pt")) == (33 + 24, 33 + 21)
    path, content = stopped / "last.pt", (stopped / "last.pt").read_bytes()
    if damage == "flip": flip(path, 5000, 3)
    else: path.write_bytes(dict(cut=content[:-1], empty=b"", text=b"hello")[damage])
    for use in (load_agent, lambda run: scoreboard(run, Walk, 2), lambda run: export_policy(run, stopped / "a.pt2")):
        with pytest.raises(RunError, match="last.pt is not a readable checkpoint.*take previous.pt or best.pt"):
            use(stopped)
    t = start(stopped)
    said = capsys.readouterr().err
    assert t.steps == dict(pretrain=33, train=21)
    assert all(x in said for x in ("last.pt is not a readable checkpoint", "kept as damaged.pt",
                                   "previous.pt, update 33 + 21; 0 logged updates are made again")), said
    list(t.run())
    assert_same_run(stopped, through.dir)
    assert not capsys.readouterr().err and steps(stopped / "previous.pt") == 33 + 35


def test_what_is_lost_is_told(stopped, capsys):
    with closing(start(stopped).run()) as loop:
        for p in loop:
            if p.step == 39: break
    flip(stopped / "last.pt", 5000)
    start(stopped)
    assert "update 33 + 35; 0 logged" in capsys.readouterr().err
    shutil.rmtree(stopped)
    with closing(start(stopped, save_every=1000).run()) as loop:
        for p in loop:
            if p.phase == "train": break
    with closing(start(stopped, save_every=1000).run()) as loop: list(loop)
    flip(stopped / "last.pt", 5000)
    start(stopped)
    assert "update 33 + 1; 39 logged updates are made again" in capsys.readouterr().err


def test_best_goes_on_too_where_nothing_else_is_left(stopped, through):
    for name in ("last.pt", "previous.pt"): flip(stopped / name, 5000)
    best = load_checkpoint(stopped / "best.pt")["steps"]["train"]
    before = {f.name: f.read_bytes() for f in stopped.glob("*.pt")}
    with pytest.raises(RunError, match=f"no good previous.pt. Copy best.pt to last.pt, to go on from its update {best} "
                                       "of phase 'train', or start anew"): start(stopped)
    assert {f.name: f.read_bytes() for f in stopped.glob("*.pt")} == before
    shutil.copy(stopped / "best.pt", stopped / "last.pt")
    finish(stopped)
    assert_same_run(stopped, through.dir)
    for f in stopped.glob("*.pt"): flip(f, 5000)
    with pytest.raises(RunError, match="there is no good previous.pt, so start anew in another directory"):
        start(stopped)


class Dead(BaseException):
    "Nothing of ours may catch it, as nothing catches a kill."


@contextmanager
def killed_at(k):
    "The k-th call of the system while files are written does not return; yields whether there was one."
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        def dying(real):
            def call(*args, **kwargs):
                calls.append(real)
                if len(calls) == k: raise Dead
                return real(*args, **kwargs)
            return call
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (training.io, "BytesIO")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        yield calls


@pytest.mark.parametrize("damaged", [False, True])
def test_at_no_instant_is_there_no_good_checkpoint(damaged, stopped, through):
    "A kill at every call of the system in taking up a run and in a save."
    for k in range(1, 100):
        run = shutil.copytree(stopped, stopped.with_name(f"killed-{k}"))
        if damaged: flip(run / "last.pt", 5000)
        with killed_at(k) as calls:
            try: start(run, env=None).save()
            except Dead: pass
        assert load_checkpoint(start(run, env=None).dir)["steps"]["train"] in ((21,) if damaged else (24,))
        assert sum(f.name in ("last.pt", "previous.pt") for f in run.iterdir()) >= 1
        if len(calls) < k: break
    assert k > 8
    finish(run)
    assert_same_run(run, through.dir)


def test_a_checkpoint_of_another_run_is_refused(stopped, tmp_path):
    finish(tmp_path / "other", env=None)
    shutil.copy(tmp_path / "other" / "last.pt", stopped / "last.pt")
    with pytest.raises(RunError, match="is another run's than its config.json"): start(stopped)


def test_tables_are_made_again_from_the_checkpoint(stopped, through):
    for name, damage in (("metrics.csv", lambda p: p.write_bytes(p.read_bytes()[:len(p.read_bytes()) // 2])),
                         ("evaluations.csv", lambda p: p.unlink()), ("warnings.csv", lambda p: p.write_bytes(b"\xff"))):
        damage(stopped / name)
    finish(stopped)
    assert_same_run(stopped, through.dir)


# Whose files

@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_outside_is_written(link, through, tmp_path):
    "Everything in the directory is a link to a file elsewhere, and so is every draft."
    run, outside = Path(shutil.copytree(through.dir, tmp_path / "run")), tmp_path / "outside"
    outside.mkdir()
    for file in [f for f in run.rglob("*") if f.is_file()]:
        for path in (file, file.with_name(file.name + ".part")):
            target = outside / path.relative_to(run).as_posix().replace("/", "-")
            if path.exists(): path.rename(target)
            else: target.write_text("precious")
            link(target, path)
    before = {f: f.read_bytes() for f in outside.iterdir()}
    append_json(run / "evaluation.json", dict(a=1))
    link(outside / "owner", run / "policy.pt2.part")
    scoreboard(finish(run, train_steps=60), episodes=2)
    append_json(run / "evaluation.json", dict(a=1))
    export_policy(run, run / "policy.pt2")
    assert {f: f.read_bytes() for f in outside.iterdir()} == before
    assert not any(f.is_symlink() for f in (run / "last.pt", run / "metrics.csv", run / "owner", run / "policy.pt2"))


@pytest.mark.parametrize("where", ["tensorboard", "tensorboard/train"])
def test_folders_elsewhere_are_not_written_to(where, stopped, tmp_path):
    shutil.move(stopped / where, tmp_path / "outside")
    (stopped / where).symlink_to(tmp_path / "outside")
    before = {f: f.read_bytes() for f in (tmp_path / "outside").rglob("*") if f.is_file()}
    finish(stopped)
    assert {f: f.read_bytes() for f in (tmp_path / "outside").rglob("*") if f.is_file()} == before
    assert not (stopped / where).is_symlink() and [*(stopped / "tensorboard" / "train").iterdir()]


def test_links_to_nowhere_in_a_new_directory_are_somebody_elses(tmp_path):
    (tmp_path / "last.pt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match="holds last.pt, but no config.json"): start(tmp_path)


# Damaged and forged files

FILES = ("config.json", "scoreboard.json", "evaluation.json", "metrics.csv", "evaluations.csv")
CURVES = [("q/mean", "train"), ("behavior/loss", "pretrain"), ("return", "train"), ("score", "train")]


def read_everything(run):
    "What is read from a run's directory; None where it was refused in a sentence that names the file."
    reads = {"config.json": read_config, "scoreboard.json": read_scoreboard, "groups": lambda d: training._grouped([d]),
             "evaluation.json": lambda d: append_json(d / "evaluation.json", {}),
             **{c: lambda d, c=c: read_column(d, *c) for c in CURVES}}
    return {what: sentence(read, run) for what, read in reads.items()}


def sentence(read, run):
    "What was read; None where it was refused in one sentence that names a file."
    try: return read(run)
    except RunError as e:
        said = str(e)
        named = (*FILES, "last.pt", "best.pt", "other settings", "was trained on")
        assert any(name in said for name in named) and "\n" not in said, said


BLOWS = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 10**6), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 10**6)),
    st.tuples(st.just("insert"), st.integers(0, 10**6), st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("all"), st.sampled_from([b"", b"[" * 50_000, b"NaN", b"{}", b"null", b"1" * 5000, b"\xff\xfe",
                                               b'{"a": 1e999}', b"step,phase\n", b"step\nx\n", b",,,\n\x00\n"])))


def struck(content, kind, *how):
    at = how[0] % len(content) if kind != "all" else None
    if kind == "flip": return content[:at] + bytes([content[at] ^ 1 << how[1]]) + content[at + 1:]
    if kind == "cut": return content[:at]
    if kind == "insert": return content[:at] + how[1] + content[at:]
    return how[0]


@pytest.fixture(scope="module")
def readable(through, tmp_path_factory):
    "A copy to damage again and again."
    run = Path(shutil.copytree(through.dir, tmp_path_factory.mktemp("readable") / "run"))
    append_json(run / "evaluation.json", dict(a=1))
    return run


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(FILES), blow=BLOWS)
def test_damaged_files_end_in_one_sentence(name, blow, readable):
    good = (readable / name).read_bytes()
    known = {k: x for k, x in json.loads(good).items() if k != "crc32"} if name in FILES[:2] else None
    try:
        (readable / name).write_bytes(struck(good, *blow))
        found = read_everything(readable)
        if known and (told := found[name]) is not None:
            assert told.items() >= known.items(), "other numbers were read without a word"
    finally: (readable / name).write_bytes(good)


@pytest.mark.parametrize("name", [*FILES, "last.pt", "previous.pt", "best.pt", "gaussian.pt", "owner", "warnings.csv"])
@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_what_is_not_a_file(name, what, readable, tmp_path):
    run = Path(shutil.copytree(readable, tmp_path / "run"))
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir() if what == "folder" else os.mkfifo(run / name)
    read_everything(run)
    for use in (start, load_agent, lambda d: scoreboard(d, Walk, 2)):
        try: use(run)
        except RunError as e: assert name in str(e) and "\n" not in str(e)


JUNK = st.one_of(st.none(), st.booleans(), st.sampled_from([-1, 0, 1.5, 1e999, float("nan"), 10**400, "", "x", "\ud800",
                                                            [], [[]], {}, {"a": {}}, [None, "x"], ["x"] * 3]))


def places(x, at=()):
    "Where something stands in nested dictionaries and lists."
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for k, y in items: yield from ((*at, k), *places(y, (*at, k)))


def forged(x, at, junk):
    "The same, with something else at that place."
    if not at: return junk
    x = dict(x) if isinstance(x, dict) else list(x)
    x[at[0]] = forged(x[at[0]], at[1:], junk)
    return x


@settings(max_examples=150, deadline=None)
@given(data=st.data(), junk=JUNK)
def test_forged_json_ends_in_one_sentence(data, junk, readable, played):
    "Wrong kinds of values under a right checksum."
    name = data.draw(st.sampled_from(FILES[:2]))
    good = {f: (readable / f).read_bytes() for f in FILES[:2]}
    told = json.loads(good[name])
    at = data.draw(st.sampled_from([*places(told)]))
    try:
        told = {k: x for k, x in forged(told, at, junk).items() if k != "crc32"}
        (readable / name).write_bytes(training._sealed(told))
        with training._unchecked(): found = read_everything(readable)
        if found["scoreboard.json"]: show_scoreboard(found["scoreboard.json"])
        with training._unchecked():    # a user has no checks of types
            board = sentence(lambda d: scoreboard(d, Walk, played=played), readable)
            if board: show_scoreboard(board)
            if name == "config.json": sentence(start, readable)
    finally:
        for f, content in good.items(): (readable / f).write_bytes(content)


@pytest.fixture(scope="module")
def played(through): return training.contest(through, episodes=2)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), junk=JUNK)
def test_forged_checkpoints_end_in_one_sentence(data, junk, readable, played):
    good = (readable / "last.pt").read_bytes()
    state = load_checkpoint(readable)
    at = data.draw(st.sampled_from([*places(state)]))
    try:
        save_checkpoint(readable / "last.pt", forged(state, at, junk))
        with training._unchecked():
            sentence(load_agent, readable)
            if board := sentence(lambda d: scoreboard(d, Walk, played=played), readable): show_scoreboard(board)
            sentence(start, readable)
    finally: (readable / "last.pt").write_bytes(good)


# Full disks

@contextmanager
def small_disk(size):
    "No file can become larger; Python lets a write fail, and does not die of the signal."
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(through, tmp_path):
    run = Path(shutil.copytree(through.dir, tmp_path / "run"))
    t = start(run)
    append_json(run / "evaluation.json", dict(a="x" * 900))
    held = lambda: {f: f.read_bytes() for f in run.iterdir() if f.is_file() and f.name != "metrics.csv"}  # noqa: E731
    before = held()
    writes = {"last.pt": t.save, "evaluation.json": lambda: append_json(run / "evaluation.json", dict(a="x" * 900)),
              "scoreboard.json": lambda: scoreboard(t, episodes=2),
              "metrics.csv": lambda: t._append("metrics.csv", training._METRIC, through.rows[-1]),
              "tfevents": lambda: [t._curves("train", 1, through.rows[-1]) for _ in range(9)],
              "policy.pt2": lambda: export_policy(t, run / "policy.pt2")}
    for name, write in writes.items():
        with small_disk(1000), pytest.raises(RunError, match=f"cannot write .*{name}.*File too large"): write()
    assert held() == before
    for size in (0, 1000):
        with small_disk(size), pytest.raises(RunError, match="cannot write"): start(run)
    finish(run)
    assert_same_run(run, through.dir)


def test_a_disk_that_fills_while_it_trains(tmp_path, through, capfd):
    with closing(start(tmp_path / "run").run()) as loop:
        for _ in range(40): next(loop)
    with small_disk(3000), pytest.raises(RunError, match="cannot write .*; choose another place, or free some"):
        watch(start(tmp_path / "run"))
    assert "Traceback" not in capfd.readouterr().err
    assert steps(tmp_path / "run") == 40
    finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", through.dir)


# Environments, options, notes, type checkers

def test_an_environment_that_cannot_be_made():
    def broken(): raise FileNotFoundError("no robot.xml")
    with pytest.raises(RunError, match=r"cannot be built \(FileNotFoundError: no robot.xml\)"): start(env=broken)
    with pytest.raises(RunError, match="environment cannot be built"): scoreboard(start(env=None), broken)


class Odd(Walk):
    "Pays or shows what it should not."
    def __init__(self, reward=None, obs=None): self.reward, self.shown = reward, obs

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs if self.shown is None else self.shown, reward if self.reward is None else self.reward[0], *rest


@pytest.mark.parametrize("env", [dict(reward=[np.inf]), dict(reward=[None]), dict(reward=[np.zeros(2)]),
                                 dict(reward=["x"]), dict(obs=np.zeros(5, np.float32)), dict(obs="x"),
                                 dict(obs=np.full(3, np.nan, np.float32))], ids=str)
def test_odd_environments_are_named_or_warned_of(env, tmp_path):
    t = start(tmp_path, env=lambda: Odd(**env))
    try: list(t.run())
    except RunError as e: assert "Odd" in str(e) and "the run is kept in" in str(e) and "\n" not in str(e)
    else: assert [w["metric"] for w in t.warnings] == ["evaluation/return"]
    assert steps(tmp_path) >= 33 + 10 and not (tmp_path / "best.pt").exists()
    finish(tmp_path)


def test_another_unit_of_the_rewards_is_told_as_an_option(tmp_path):
    def run(unit, rule, **more):
        return Training(scale_reward(toy(), rule), PLAN, TINY, Walk, tmp_path, True, dict(reward=unit, **more))
    run("chosen", "none")
    with pytest.raises(RunError, match="it was started without --reward .so that a unit was chosen., and is now "
                                       "asked for with --reward antmaze. Resume"): run("antmaze", "antmaze")


def test_what_is_not_clearly_better_is_noted():
    near = [line(52), line(50, "last", seed=1)]
    assert not training._verdict(near, SIGNS, 1)
    said, = training._unclear(near, SIGNS, 1)
    assert all(x in said for x in ("not clearly more than behavior (", "more episodes would tell",
                                   "If it stays so: A path costs 2 nats", "a larger eta"))
    assert "nearly nu; a smaller eta" in training._unclear(near, SIGNS | dict(penalty=0.01), 1)[0]
    for rows in ([line(50), line(99, "last")], [line(99), line(50, "last", seed=1)], [line(50)],
                 [line(50), line(0, "last") | dict(mean=None, returns=[None])]):
        assert not training._unclear(rows, SIGNS, 1), "better, surely worse, absent, unknown"
    assert not training._unclear(near, SIGNS | dict(moved=False), 1)
    board = dict(rows=[], unit="score", episodes=20, seed=0, env=None, warnings=[], notes=["so it is"])
    assert show_scoreboard(board).endswith("**Note.** so it is")


def test_a_policy_is_exported_while_types_are_checked(through, tmp_path):
    play = torch.export.load(export_policy(through, tmp_path / "a.pt2", num_actions=2)).module()
    obs = np.ones((1, 3), np.float32)
    np.testing.assert_allclose(play(torch.from_numpy(obs)), through.agent.policy("best", 2)(obs), atol=1e-5)
    assert not training.jaxtyping.config.jaxtyping_disable
