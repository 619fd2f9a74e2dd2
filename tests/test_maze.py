"""The maze data set: determinism, storage in one move, and the environment it is judged in."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from PIL import Image

import bdpo_lit.offline.maze as maze
from bdpo_lit.evidence.demo import PRESETS
from bdpo_lit.offline.data import DataError, load_minari
from bdpo_lit.offline.maze import (
    CELLS,
    GOAL_RADIUS,
    GOAL_XY,
    MAZE_ID,
    TIME_LIMIT,
    WaypointController,
    collect_maze,
    drive,
    episode_gif,
    make_maze_env,
    maze_reference,
    play,
    random_policy,
)
from bdpo_lit.reference.style import RESULTS

SMALL = "toy/maze-small-v0"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def arrays(dataset):
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    return [{k: np.asarray(getattr(e, k)) for k in names} for e in dataset.iterate_episodes()]


def same(a, b):
    return len(a) == len(b) and all(x[k].tobytes() == y[k].tobytes() for x, y in zip(a, b, strict=True) for k in x)


def test_same_seed_same_bytes_other_seed_other_data():
    first = arrays(collect_maze(700, 3, "toy/a-v0", progress=False))
    assert same(first, arrays(collect_maze(700, 3, "toy/b-v0", progress=False)))
    assert not same(first, arrays(collect_maze(700, 4, "toy/c-v0", progress=False)))


def test_same_bytes_in_a_fresh_process():
    code = ("import hashlib; from bdpo_lit.offline.maze import drive; es = drive(400, 1); "
            "print(hashlib.sha256(b''.join(e.observations.tobytes() + e.actions.tobytes() for e in es)).hexdigest())")
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    content = b"".join(e.observations.tobytes() + e.actions.tobytes() for e in drive(400, 1))
    assert fresh == hashlib.sha256(content).hexdigest()


def test_stored_data_fit_the_task(root):
    dataset = collect_maze(1000, 0, SMALL, progress=False)
    episodes = arrays(dataset)
    assert [len(e["rewards"]) for e in episodes] == [300, 300, 300, 100]
    for e in episodes:
        assert len(e["observations"]) == len(e["rewards"]) + 1
        distance = np.linalg.norm(e["observations"][1:, :2] - GOAL_XY, axis=-1)
        clear = np.abs(distance - GOAL_RADIUS) > 1e-5
        np.testing.assert_array_equal(e["rewards"][clear], (distance <= GOAL_RADIUS)[clear])
        assert not e["terminations"].any() and e["truncations"].sum() == 1 and e["truncations"][-1]
        assert np.abs(e["actions"]).max() <= 1
    data = load_minari(SMALL)
    assert len(data) == 1000 and not data.terminal.any()
    steps = (data.next_obs - data.obs)[:, :2].norm(dim=-1)
    assert steps.max() < 0.06  # 5.3 cells per second at most, 0.01 s per step: no jumps between episodes
    assert data.meta["env_id"] == maze.MAZE_ENV_ID


def test_metadata_is_complete_and_names_no_local_path(root):
    dataset = collect_maze(400, 0, SMALL, progress=False)
    stored = dataset.storage.metadata
    low, high = maze_reference()
    assert (stored["ref_min_score"], stored["ref_max_score"]) == (low, high) and low < 1 and 150 < high < 300
    for key in ("author", "description", "code_permalink", "algorithm_name", "eval_env_spec", "requirements"):
        assert stored[key], key
    chapter = stored["code_permalink"].partition("/blob/main/")[2]
    assert chapter == "nbs/offline/14_maze.ipynb"
    assert (Path(__file__).resolve().parent.parent / chapter).is_file()
    text = (root / SMALL / "data" / "metadata.json").read_text()
    assert str(root) not in text and os.path.expanduser("~") + "/" not in text
    assert minari.get_normalized_score(dataset, np.array([high]))[0] == 1.0


def test_evaluation_environment_is_rebuilt_from_metadata_alone(root):
    collect_maze(400, 0, SMALL, progress=False)
    code = (f"import minari; e = minari.load_dataset('{SMALL}').recover_environment(eval_env=True); "
            "print(e.reset(seed=7)[0].tolist(), e.spec.max_episode_steps)")
    out = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    env = make_maze_env()
    assert out.stdout.strip() == f"{env.reset(seed=7)[0].tolist()} {TIME_LIMIT}"


def test_existing_set_is_returned_and_other_recipes_are_refused(root):
    collect_maze(400, 0, SMALL, progress=False)
    before = (root / SMALL / "data" / "main_data.hdf5").stat().st_mtime_ns
    collect_maze(400, 0, SMALL, progress=False)
    assert (root / SMALL / "data" / "main_data.hdf5").stat().st_mtime_ns == before
    for other in (dict(num_steps=500), dict(seed=1), dict(noise=0.1)):
        with pytest.raises(DataError, match=SMALL) as error:
            collect_maze(**{**dict(num_steps=400, seed=0, dataset_id=SMALL, progress=False), **other})
        assert "another dataset_id" in str(error.value)
    assert (root / SMALL / "data" / "main_data.hdf5").stat().st_mtime_ns == before


FAULTS = ["no metadata", "cut metadata", "cut data", "no data", "empty folder", "episode lost"]


@pytest.mark.parametrize("fault", FAULTS)
def test_half_written_folder_is_collected_anew(fault, root):
    good = arrays(collect_maze(700, 0, SMALL, progress=False))
    folder = root / SMALL / "data"
    meta, main = folder / "metadata.json", folder / "main_data.hdf5"
    if fault == "no metadata":
        meta.unlink()
    elif fault == "cut metadata":
        meta.write_text(meta.read_text()[:100])
    elif fault == "cut data":
        main.write_bytes(main.read_bytes()[:3000])
    elif fault == "no data":
        main.unlink()
    elif fault == "empty folder":
        meta.unlink(), main.unlink(), folder.rmdir()
    else:
        with h5py.File(main, "a") as f:
            del f["episode_2"]
    left = sorted(p.relative_to(root / SMALL) for p in (root / SMALL).rglob("*"))
    with pytest.warns(UserWarning, match=r"half-written.* moved to \.maze-small-v0\.broken-1"):
        dataset = collect_maze(700, 0, SMALL, progress=False)
    assert same(arrays(dataset), good)
    aside = root / "toy" / ".maze-small-v0.broken-1"                   # nothing is lost, and Minari does not see it
    assert sorted(p.relative_to(aside) for p in aside.rglob("*")) == left
    assert list(minari.list_local_datasets()) == [SMALL]


def test_files_that_may_not_be_ours_survive_damaged_metadata(root):
    folder = root / SMALL / "data"
    for n, text in enumerate(("{", "[]", ""), 1):
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(text)
        (folder / "main_data.hdf5").write_bytes(b"precious")
        with pytest.warns(UserWarning, match=f"broken-{n}"):
            assert maze._find(SMALL, {}) is None
        assert (root / "toy" / f".maze-small-v0.broken-{n}" / "data" / "main_data.hdf5").read_bytes() == b"precious"


def test_a_complete_set_held_open_by_another_process_is_not_touched(root):
    collect_maze(400, 0, SMALL, progress=False)
    main = root / SMALL / "data" / "main_data.hdf5"
    before = main.read_bytes()
    code = f"import h5py; f = h5py.File({str(main)!r}, 'a'); print('open', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "HDF5_USE_FILE_LOCKING": "TRUE"}) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(DataError, match="cannot be used.*lock.*holds it open"):
            collect_maze(400, 0, SMALL, progress=False)
        holder.communicate("\n")
    assert len(main.read_bytes()) == len(before) and [p.name for p in (root / "toy").iterdir()] == ["maze-small-v0"]
    assert collect_maze(400, 0, SMALL, progress=False).total_steps == 400


@pytest.mark.parametrize("where", ["h5py.File", "pathlib.Path.read_text", "pathlib.Path.rename"])
def test_missing_permissions_are_a_clear_message(where, root, monkeypatch):
    collect_maze(400, 0, SMALL, progress=False)
    if where.endswith("rename"): (root / SMALL / "data" / "metadata.json").unlink()

    def refuse(*args, **kwargs): raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(where, refuse)
    with pytest.raises(DataError, match="Permission denied.*check its permissions"):
        collect_maze(400, 0, SMALL, progress=False)
    assert (root / SMALL / "data" / "main_data.hdf5").exists()


def test_a_foreign_set_under_our_name_is_not_touched(root):
    collect_maze(400, 0, SMALL, progress=False)
    path = root / SMALL / "data" / "metadata.json"
    stored = json.loads(path.read_text())
    for recipe in (None, "two eggs", {"flour": 500}):                  # other people may write such a field, too
        path.write_text(json.dumps({**stored, "recipe": recipe}))
        with pytest.raises(DataError, match=f"made with ({'something else' if recipe is None else '.*(eggs|flour)'})"):
            collect_maze(400, 0, SMALL, progress=False)
    assert path.exists()


def test_interruption_leaves_nothing_behind(root, monkeypatch):
    original = minari.create_dataset_from_buffers

    def interrupt(*args, **kwargs):
        original(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(minari, "create_dataset_from_buffers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect_maze(400, 0, SMALL, progress=False)
    assert os.environ["MINARI_DATASETS_PATH"] == str(root)
    assert list(root.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    assert collect_maze(400, 0, SMALL, progress=False).total_steps == 400


def test_collecting_needs_steps():
    with pytest.raises(DataError, match="at least 2"):
        collect_maze(1, progress=False)


def test_environment_api():
    from gymnasium.utils.env_checker import check_env

    for start in ("fixed", "any"):
        check_env(make_maze_env(start=start).unwrapped, skip_render_check=True)
    with pytest.raises(ValueError, match="'fixed' or 'any'"):
        gym.make(maze.MAZE_ENV_ID, start="there")


def test_environment_hides_a_fixed_goal_and_never_terminates():
    env = make_maze_env()
    for seed in range(5):
        env.reset(seed=seed)
        np.testing.assert_array_equal(env.unwrapped.maze.goal, GOAL_XY)
    path, total = play(WaypointController(), env)
    assert path.shape == (TIME_LIMIT + 1, 4)
    assert total == (np.linalg.norm(path[1:, :2] - GOAL_XY, axis=-1) <= GOAL_RADIUS).sum()


def test_building_environments_leaves_no_files_in_the_temporary_folder(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    make_maze_env().close()
    assert [p for p in tmp_path.iterdir() if p.suffix == ".xml"] == []


@pytest.mark.parametrize("goal", CELLS)
def test_controller_reaches_every_cell_from_everywhere(goal):
    env = make_maze_env(start="any")
    center = np.array(maze.cell_center(*goal))
    for seed in range(4):
        path, _ = play(WaypointController(tuple(center)), env, seed)
        assert np.linalg.norm(path[-1, :2] - center) < 0.1


def test_controller_beats_behaviour_beats_random():
    low, high = maze_reference()
    behaviour = np.mean([e.rewards.sum() for e in drive(20 * TIME_LIMIT, seed=1, start="fixed")])
    assert low <= 1 < behaviour < 0.4 * high


def test_behaviour_goes_both_ways_in_the_corridor():
    es = drive(9000, seed=0)
    obs, action = np.concatenate([e.observations[:-1] for e in es]), np.concatenate([e.actions for e in es])
    here = (np.abs(obs[:, :2] - [1, 0]).max(-1) < 0.4) & (np.linalg.norm(obs[:, 2:], axis=-1) < 2)
    assert here.sum() > 30
    assert min((action[here, 1] > 0.5).mean(), (action[here, 1] < -0.5).mean()) > 0.2


def test_gif_of_an_episode(tmp_path):
    path, _ = play(random_policy(0), make_maze_env())
    with Image.open(episode_gif(tmp_path / "a.gif", path, every=20)) as image:
        assert image.format == "GIF" and image.n_frames > 3
    with pytest.raises(ValueError, match="renderer"):
        episode_gif(tmp_path / "a.gif", path, renderer="crayon")


def test_gif_falls_back_to_drawing_where_mujoco_cannot_render(tmp_path, monkeypatch):
    def blind(states):
        raise RuntimeError("no OpenGL")

    monkeypatch.setattr(maze, "_mujoco_frames", blind)
    with pytest.warns(UserWarning, match="drawing instead"):
        file = episode_gif(tmp_path / "a.gif", np.zeros((21, 4)), renderer="mujoco")
    assert file.exists()


def test_default_id_is_the_documented_one():
    assert MAZE_ID == "bdpo/pointmaze-umaze-hidden-v0"


def test_results_were_made_with_the_presets_of_today():
    made_with = dict(long={"actor_decay_steps": 7500}, short={})              # chapter 20 says so
    for name in PRESETS.keys() & made_with.keys():
        found = json.loads((RESULTS / f"maze_{name}.json").read_text())
        assert found
        for run in found:
            for part in ("train", "algorithm"):
                want = json.loads(json.dumps(vars(getattr(PRESETS[name], part))))
                made = run["config"][part]
                want |= made_with[name] if part == "algorithm" else dict(seed=run["seed"], device=made["device"])
                assert want | made == want, (name, run["seed"], part)
