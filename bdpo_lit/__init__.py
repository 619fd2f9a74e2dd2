"""BDPO, read and run: what a user needs, by name. A name is imported when it is first used."""
import importlib

__version__ = "0.1.0"

_HOME = {name: module for module, names in {
    "algorithm.bdpo": "BDPO BDPOConfig",
    "offline.data": "DataError Transitions describe load load_minari",
    "offline.maze": "MAZE_ID collect_maze make_maze_env",
    "offline.evaluation": "Evaluation evaluate score_table",
    "offline.training": "RunError TrainConfig Training load_agent watch",
    "offline.tasks": "Task d4rl_task",
    "evidence.cheetah": "collect_cheetah",
    "evidence.demo": "PRESETS",
}.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'bdpo_lit' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"bdpo_lit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__})
