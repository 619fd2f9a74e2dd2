"""BDPO, read and run: what a user needs, by name. A name is imported when it is first used."""
import ctypes.util
import importlib
import os

__version__ = "0.2.0"

_HOME = {name: module for module, names in {
    "algorithm.bdpo": "BDPO BDPOConfig",
    "offline.data": "DataError Transitions describe from_arrays load load_minari",
    "offline.maze": "MAZE_ID collect_maze make_maze_env",
    "offline.evaluation": "Evaluation evaluate score_table",
    "offline.training": "RunError TrainConfig Training export_policy load_agent scoreboard show_scoreboard watch",
    "offline.tasks": "Task d4rl_task",
    "offline.own_data": "choose show_choice",
    "evidence.cheetah": "collect_cheetah",
    "evidence.demo": "PRESETS",
}.items() for name in names.split()}
__all__ = sorted(_HOME)


def _can_draw():
    """MuJoCo cannot be imported where MUJOCO_GL names a library that is missing, not even to draw nothing. Then it is
    told to draw nothing, and whoever draws hears of it (`offline.evaluation.CannotDraw`)."""
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    library = {"osmesa": "OSMesa", "egl": "EGL"}.get(asked)
    if library and os.name == "posix" and not ctypes.util.find_library(library):
        os.environ.update(MUJOCO_GL="disabled", BDPO_LIT_NO_GL=f"MUJOCO_GL={asked}, but lib{library} is missing")


_can_draw()


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'bdpo_lit' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"bdpo_lit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__})
