"""Damaged and hostile data files, and what came of loading them.

`fuzz(count, seed, folder)` makes `count` odd inputs, one after another. Each begins as a good file of one of the
kinds in BASES and gets one fault of MUTATIONS. A fault knows what is right:

    right    nothing is lost: exactly the original transitions
    refused  a DataError that names the file
    same     the original or a DataError (there are checksums)
    any      a DataError, or numbers, maybe others (HDF5 has no checksum of numbers unless asked)

Everything else is a failure: another exception, a silent acceptance, a refusal of good data, a message that does not
name the file or could upset a terminal, 10 s, 300 MB. Input k of a seed is `one(seed, k, folder)`, alone."""
import io
import json
import os
import shutil
import struct
import time
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

from bdpo_lit.offline.data import DataError, load

try:
    import resource
except ImportError:                                      # Windows
    resource = None

FIELDS = ("obs", "action", "reward", "next_obs", "terminal", "episode")
LENGTHS = ((9, True), (7, False), (8, True))            # steps of an episode, and whether it ends or is cut


# ---- good files; all numbers are exact in float16

def rows(rng, T):
    eighths = lambda high, *shape: rng.integers(-high, high + 1, shape) / 8
    return dict(observations=eighths(16, T + 1, 3).astype("f4"), actions=eighths(7, T, 2).astype("f4"),
                rewards=eighths(20, T).astype("f4"))


def recordings():
    rng = np.random.default_rng(0)
    return [rows(rng, T) | dict(end=end) for T, end in LENGTHS]


def transitions(timeouts_kept, ends_count=True):
    "What a loader must find, told row by row."
    found = {k: [] for k in FIELDS}
    for k, e in enumerate(recordings()):
        T = len(e["rewards"])
        for t in range(T):
            last, d = t == T - 1, t == T - 1 and e["end"] and ends_count
            if last and not d and not timeouts_kept: continue
            following = e["observations"][t if d and not timeouts_kept else t + 1]   # anything where terminal
            for name, x in zip(FIELDS, (e["observations"][t], e["actions"][t], e["rewards"][t], following, d, k),
                               strict=True): found[name].append(x)
    return {k: np.array(x, "i8" if k == "episode" else "f4") for k, x in found.items()}


def d4rl():
    es = recordings()
    last = [np.arange(len(e["rewards"])) == len(e["rewards"]) - 1 for e in es]
    join = lambda parts: np.concatenate(list(parts))
    return dict(observations=join(e["observations"][:-1] for e in es), actions=join(e["actions"] for e in es),
                rewards=join(e["rewards"] for e in es), terminals=join(x & e["end"] for e, x in zip(es, last,
                                                                                                    strict=True)),
                timeouts=join(x & (not e["end"]) for e, x in zip(es, last, strict=True)))


def ogbench():
    "Compact: a row more than steps, terminals at the last; masks are 0 where a task is done."
    es = recordings()
    join = lambda parts: np.concatenate(list(parts))
    more = lambda x: np.concatenate([x, np.zeros_like(x[:1])])
    last = join(np.arange(len(e["rewards"]) + 1) == len(e["rewards"]) for e in es)
    done = join((np.arange(len(e["rewards"]) + 1) == len(e["rewards"]) - 1) & e["end"] for e in es)
    return dict(observations=join(e["observations"] for e in es), actions=join(more(e["actions"]) for e in es),
                rewards=join(more(e["rewards"]) for e in es), terminals=last.astype("f4"),
                masks=1 - done.astype("f4"), qpos=np.zeros((len(last), 4)))


def write_minari(name, dictionary=False):
    obs = gym.spaces.Box(-9, 9, (3,))
    cut = lambda x: dict(a=x[:, :1], b=x[:, 1:]) if dictionary else x
    if dictionary: obs = gym.spaces.Dict(a=gym.spaces.Box(-9, 9, (1,)), b=gym.spaces.Box(-9, 9, (2,)))
    buffers = []
    for e in recordings():
        last = np.arange(len(e["rewards"])) == len(e["rewards"]) - 1
        buffers.append(EpisodeBuffer(observations=cut(e["observations"]), actions=e["actions"], rewards=e["rewards"],
                                     terminations=last & e["end"], truncations=last & (not e["end"])))
    minari.create_dataset_from_buffers(name, buffers, observation_space=obs, action_space=gym.spaces.Box(-1, 1, (2,)),
                                       env="Pendulum-v1")


def write_bases(folder):
    "Kind -> (file or folder, what it must give)."
    flat, goal = transitions(False), transitions(True)
    for kind, layout, libver in (
            ("hdf5", {}, "earliest"), ("chunked.hdf5", dict(compression="gzip"), "earliest"),
            ("checked.hdf5", dict(fletcher32=True, shuffle=True, compression="gzip"), "latest")):
        with h5py.File(folder / f"base.{kind}", "w", libver=libver) as f:
            for key, x in d4rl().items():
                f.create_dataset(key, data=x, **layout, **(dict(chunks=(10, *x.shape[1:])) if layout else {}))
    np.savez(folder / "base.npz", **d4rl())
    np.savez_compressed(folder / "base.ogbench.npz", **ogbench())
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    for name in ("flat", "dict"): write_minari(f"toy/{name}-v0", name == "dict")
    bases = {kind: (folder / f"base.{kind}", flat) for kind in ("hdf5", "checked.hdf5", "chunked.hdf5", "npz")}
    for name in ("flat", "dict"): bases[f"minari {name}"] = (folder / "minari" / f"toy/{name}-v0", goal)
    return bases | {"ogbench.npz": (folder / "base.ogbench.npz", goal)}


class Input:
    "A copy of a good file, to be damaged."
    def __init__(self, kind, base, want, folder, rng):
        self.kind, self.want, self.rng, self.folder, self.kwargs = kind, want, rng, folder, {}
        self.minari, self.npz = kind.startswith("minari"), kind.endswith("npz")
        self.path = folder / ("minari/toy/odd-v0" if self.minari else f"odd.{kind.split('.')[-1]}")
        for old in (self.path, folder / "elsewhere"): remove(old)
        if self.minari: shutil.copytree(base, self.path)
        else: shutil.copyfile(base, self.path)
        self.name = "toy/odd-v0" if self.minari else self.path
        self.data = self.path / "data" / "main_data.hdf5" if self.minari else self.path  # what holds the numbers
        self.json = self.path / "data" / "metadata.json"

    def pick(self, *choices): return choices[self.rng.integers(len(choices))]

    def array(self):
        "Where an array that is read lies, and its name in D4RL."
        table = ogbench if "og" in self.kind else d4rl
        if not self.minari: return "", self.pick(*(k for k in table() if k != "qpos"))
        key = self.pick("observations", "actions", "rewards", "terminations")
        group = f"episode_{self.rng.integers(len(LENGTHS))}/"
        if "dict" in self.kind and key == "observations": return group + "observations/", self.pick("a", "b")
        return group, key

    def members(self):
        with zipfile.ZipFile(self.path) as z: return {m.filename: z.read(m) for m in z.infolist()}


def remove(path):
    if path.is_symlink() or path.is_file() or path.is_fifo(): path.unlink()
    elif path.exists(): shutil.rmtree(path)


# ---- arrays of another kind or shape

FLAGS = ("terminals", "timeouts", "terminations", "masks")

def same_numbers(i, key, x):
    "The same numbers in another form."
    forms = [lambda: x.astype(x.dtype.newbyteorder(">")), lambda: x.astype("f8"), lambda: x.astype("f2"),
             lambda: x.astype(">f8"), lambda: x.astype("g"), lambda: np.asfortranarray(x)]
    if x.ndim == 1: forms.append(lambda: x[:, None])
    if key in FLAGS: forms += [lambda: x.astype("u1"), lambda: x.astype(">i8"), lambda: x.astype(bool),
                               lambda: x.astype("i2")]
    return i.pick(*forms)()


def no_such_array(i, key, x):
    "What can be no column of this name."
    n, flat = len(x), x.astype("f4")
    at = i.rng.integers(n)
    def put(value, dtype="f8"):
        y = x.astype(dtype)
        y[at] = value
        return y
    odd = [lambda: put(np.nan), lambda: put(np.inf), lambda: put(-np.inf, "f4"), lambda: x.astype("c16"),
           lambda: np.full(x.shape, b"abc"), lambda: np.zeros(x.shape, [("a", "f4"), ("b", "i4")]), lambda: x[:-1],
           lambda: np.concatenate([x, x[:1]]), lambda: flat[:0], lambda: np.float32(1), lambda: np.zeros((2, n), "f4"),
           lambda: np.zeros(x.shape, "V7"), lambda: np.zeros((n, 0), "f4"), lambda: np.full(x.shape, np.nan, "f2"),
           lambda: np.full(x.shape, np.longdouble("1e400")), lambda: np.stack([flat] * 3, -1)]
    if i.minari: odd += [lambda: np.zeros((n, 9), "f4")]      # a table has no other width to compare with
    if key in FLAGS: odd += [lambda: put(i.pick(0.5, -2, 2, 1e-9, 255))] * 4
    if key == "actions": odd += [lambda: flat * 99 + 2, lambda: flat[:, 0], lambda: (x > 0).astype(int)[:, 0]]
    if key in ("rewards", "observations", "a", "b"): odd += [lambda: np.full(x.shape, 1e300)]
    if key == "observations": odd += [lambda: flat[:, 0], lambda: np.zeros((n, 4, 4, 3), "u1")]
    return i.pick(*odd)()


def write_array(i, make):
    "Replace one array by another."
    group, key = i.array()
    if i.npz:
        members = i.members()
        x = make(i, key, np.load(io.BytesIO(members[key + ".npy"])))
        out = io.BytesIO()
        np.lib.format.write_array(out, np.asanyarray(x), i.pick(None, (2, 0)))
        with zipfile.ZipFile(i.path, "w", i.pick(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)) as z:
            for name, data in (members | {key + ".npy": out.getvalue()}).items(): z.writestr(name, data)
        return
    with h5py.File(i.data, "a") as f:
        x = make(i, key, f[group + key][()])
        del f[group + key]
        f[group + key] = x


def other_form(i): write_array(i, same_numbers); return "right"
def wrong_array(i): write_array(i, no_such_array); return "refused"


# ---- what HDF5 can do beside holding numbers

def harmless_hdf5(i):
    "Attributes, names, links and layouts that change nothing."
    group, key = i.array()
    with h5py.File(i.data, "a") as f:
        x = f[group + key][()]
        def layout(**kw):
            del f[group + key]
            f.create_dataset(group + key, data=x, **kw)
        chunks = tuple(int(i.rng.integers(1, n + 1)) for n in x.shape)
        inside = f[group] if group else f
        aside = f["episode_0"] if i.minari else f
        i.pick(lambda: layout(chunks=chunks), lambda: layout(chunks=chunks, compression="gzip", shuffle=True),
               lambda: layout(chunks=chunks, fletcher32=True), lambda: layout(chunks=True, maxshape=(None,) * x.ndim),
               lambda: layout(chunks=(999, *x.shape[1:]), compression="gzip", fletcher32=True,
                              maxshape=(None,) * x.ndim),
               lambda: layout(chunks=chunks, shuffle=True, fillvalue=9), lambda: layout(),
               lambda: inside[key].attrs.__setitem__("big", np.zeros(8000)),
               lambda: f.attrs.__setitem__("odd", np.bytes_(b"\xff\xfe")),
               lambda: h5py.h5g.create(aside.id, b"\xff\xfe\x1b[2J"),
               lambda: aside.__setitem__("infos", h5py.SoftLink("/no/where")),
               lambda: aside.__setitem__("infos", h5py.ExternalLink("/etc/passwd", "/x")),
               lambda: aside.create_dataset("infos/text", data=["a", "b"], dtype=h5py.string_dtype()))()
    return "right"


def strange_hdf5(i):
    "In place of an array: what leads elsewhere, is no array of numbers, or is not there in full."
    group, key = i.array()
    other = i.folder / "elsewhere"
    with h5py.File(i.data, "a") as f:
        x = f[group + key][()]
        if i.pick(0, 1): shutil.copyfile(i.folder / "base.hdf5", other)                # or there is no such file
        del f[group + key]
        g = f[group] if group else f
        stretch = (10**13, *x.shape[1:])
        chunks = (10**6, *x.shape[1:])
        def virtual():
            layout = h5py.VirtualLayout(x.shape, "f4")
            layout[:] = h5py.VirtualSource(str(other), "observations", x.shape)
            g.create_virtual_dataset(key, layout)
        def partly(**kw):
            y = g.create_dataset(key, x.shape, x.dtype, chunks=(2, *x.shape[1:]), **kw)
            y[:i.rng.integers(1, len(x) - 2)] = 1
        def piece(data, mask=0, **kw):
            kw = dict(compression="gzip") | kw
            y = g.create_dataset(key, x.shape, x.dtype, chunks=x.shape, **kw)
            y.id.write_direct_chunk((0,) * x.ndim, data, mask)
        def twice():
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk(x.shape); plist.set_deflate(9); plist.set_deflate(9)
            y = h5py.h5d.create(g.id, key.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(x.shape), plist)
            y.write_direct_chunk((0,) * x.ndim, zlib.compress(zlib.compress(bytes(10**7), 9), 9))
        bomb = lambda: zlib.compress(bytes(int(i.rng.integers(10**6, 3 * 10**7))), 9)
        i.pick(lambda: g.__setitem__(key, h5py.SoftLink(i.pick("/observations", "/no/where", ".", "/"))),
               lambda: g.__setitem__(key, h5py.ExternalLink(str(other), i.pick("/observations", "/no"))),
               lambda: g.create_dataset(key, x.shape, "<f4", external=[(str(other), 0, x.size * 4)]),
               virtual, lambda: g.create_group(key), lambda: g.__setitem__(key, np.dtype("f4")),
               lambda: g.__setitem__(key, h5py.Empty("f4")), lambda: g.create_dataset(key, x.shape, x.dtype), partly,
               lambda: partly(compression="gzip"), lambda: g.create_dataset(key, stretch, "f4", chunks=chunks),
               lambda: g.create_dataset(key, x.shape, "f4", chunks=(2**27, *x.shape[1:]), maxshape=(None,) * x.ndim),
               lambda: piece(bomb()), lambda: piece(zlib.compress(x.tobytes()[:-1])), lambda: piece(b"x"), twice,
               lambda: piece(x.tobytes()[:-4], 1), lambda: piece(x.tobytes() + b"more", 1), lambda: piece(b"\0" * 99),
               lambda: piece(x.tobytes()[:-3], compression=None), lambda: piece(bomb()[:-99]),
               lambda: g.create_dataset(key, data=x, chunks=x.shape, compression="lzf"),
               lambda: g.create_dataset(key, data=x.astype("i4"), chunks=x.shape, scaleoffset=0),
               lambda: g.create_dataset(key, x.shape, h5py.enum_dtype({"no": 0, "yes": 1})),
               lambda: g.create_dataset(key, x.shape, h5py.ref_dtype), lambda: g.create_dataset(key, x.shape,
                                                                                                h5py.string_dtype()),
               lambda: g.create_dataset(key, x.shape, h5py.vlen_dtype("f4")),
               lambda: g.create_dataset(key, data=np.zeros(x.shape, "(2,)f4")) if x.ndim > 1 else None,
               lambda: h5py.h5g.create(g.id, b"\xff\x1b[2J\n" + key.encode()), lambda: None)()
    return "refused"


# ---- what else an archive can say

def npy(descr, shape, body):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(descr=descr, fortran_order=False, shape=shape))
    return out.getvalue() + body


def write_zip(path, members, method=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as z:
        warnings.simplefilter("ignore")                                                # names that come twice
        for name, data in members: z.writestr(name, data)


def harmless_npz(i):
    members = list(i.members().items())
    extra = [("infos.npy", b"junk"), ("a/b.npy", b""), ("../../up.npy", b"x"), ("\x1b[2J", b""), ("folder/", b""),
             ("objects.npy", npy("|O", (2,), b"\x80\x04N."))]
    write_zip(i.path, members + [i.pick(*extra)], i.pick(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    return "right"


def strange_npz(i):
    key = i.array()[1] + ".npy"
    members = i.members()
    body, x = members[key], np.load(io.BytesIO(members[key]))
    raw, n = x.tobytes(), len(x)
    zeros = bytes(int(i.rng.integers(10**6, 3 * 10**7)))
    new = i.pick(lambda: npy("<f4", (10**12, *x.shape[1:]), raw), lambda: npy("<f4", (10**9,), raw), lambda: b"",
                 lambda: body[:-1],
                 lambda: body + b"more", lambda: npy("|O", x.shape, b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."),
                 lambda: npy("<f4", (-1, n), raw), lambda: npy("(99999999,)f4", x.shape, raw), lambda: raw,
                 lambda: npy("|S999999999", x.shape, raw), lambda: npy("<M8[s]", x.shape, bytes(8 * x.size)),
                 lambda: b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + raw,
                 lambda: b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10000,
                 lambda: b"\x93NUMPY\x09\x00" + body[8:], lambda: npy("<f4", x.shape, zeros), lambda: None)()
    if new is None: write_zip(i.path, [*members.items(), (i.pick(key, key[:-4]), i.pick(body, b"", raw))])
    else: write_zip(i.path, (members | {key: new}).items(), i.pick(*(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) * 2,
                                                                    zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    if i.rng.random() < 0.2:                                                           # sizes in the list of contents
        content = bytearray(i.path.read_bytes())
        at = content.find(b"PK\x01\x02", content.find(b"PK\x01\x02") + 4 * i.pick(0, 1))
        content[at + 20: at + 28] = struct.pack("<II", *i.rng.integers(0, 2**32, 2, "u8"))
        i.path.write_bytes(content)
    return "refused"


def packed_otherwise(i):
    write_zip(i.path, i.members().items(), i.pick(zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    return "refused"


# ---- a set's folder, and what it says of itself

DEEP = "[" * 50_000 + "]" * 50_000
ODD_JSON = ("-1", "0", "2", "4", "1e9", "1000000000", "1" + "0" * 400, "true", "null", "[]", "{}", '"x"', '"3"',
            "2.5", "NaN",
            "Infinity", DEEP, '"\\u001b[2J\\ud800"', '{"a": [1]}', '"' + "y" * 10_000 + '"')


def box(**kw): return json.dumps(dict(type="Box", dtype="float32", shape=[3], low=[-9.0] * 3, high=[9.0] * 3) | kw)


def nested(depth):
    return '{"type": "Dict", "subspaces": {"a": ' * depth + box(shape=[1], low=[-9], high=[9]) + "}}" * depth


ODD_SPACES = (box(shape=[10**9], low=0.0, high=1.0), box(shape=[10**13], low=0.0, high=1.0), box(dtype="U99999999"),
              box(dtype="O"),
              box(dtype="int32"), box(dtype="(9999,)f4"), box(shape=[3, 10**9]), box(shape=[-3]), box(shape=[]),
              box(shape=["3"]),
              box(low=[9.0] * 3, high=[-9.0] * 3), box(shape=[2], low=[0, 0], high=[1, 1]), nested(1), nested(150),
              nested(900),
              '{"type": "Discrete", "n": 1000000000, "start": 0}', '{"type": "MultiBinary", "n": 1000000000}',
              '{"type": "Text", "max_length": 9, "min_length": 0, "charset": "ab"}',
              '{"type": "Dict", "subspaces": {}}',
              '{"type": "Tuple", "subspaces": []}', '{"type": "os:system"}', "[]", "", "{", DEEP, "3", "null")
ODD_SPECS = ("{}", "", "[]", DEEP, '{"id": 5}',
             '{"id": "Pendulum-v1", "entry_point": "os:system", "kwargs": {"command": "touch owned"}}',
             '{"id": "x", "kwargs": [1]}', '{"id": "Pendulum-v1", "max_episode_steps": -3}', '{"id": "\\u001b"}',
             '{"id": "Pendulum-v1", "max_episode_steps": 1' + "0" * 300 + "}")


def rewrite(i, **changes):
    stored = {k: json.dumps(x) for k, x in json.loads(i.json.read_text()).items()} | changes
    i.json.write_text("{" + ", ".join(f'"{k}": {x}' for k, x in stored.items() if x) + "}")


def metadata(i):
    "A value of another type, or none."
    key = i.pick("total_episodes", "total_steps", "data_format", "minari_version", "observation_space", "action_space",
                 "ref_min_score", "ref_max_score", "author", "env_spec", "dataset_size")
    new = i.pick("", *ODD_JSON)
    rewrite(i, **{key: new})
    if DEEP in new or key in ("total_episodes", "data_format", "minari_version"): return "refused"
    if key == "total_steps": return "right" if new == "" else "refused"
    if key.startswith("ref"):
        return "right" if new in ("", "-1", "0", "2", "4", "1e9", "1000000000", "null", "2.5") else "refused"
    return "refused" if key.endswith("_space") else "right"                            # the pendulum's spaces differ


def spaces(i):
    key = i.pick("observation", "action")
    odd = i.pick(*ODD_SPACES)
    rewrite(i, **{key + "_space": json.dumps(odd)})
    return "refused"


def specification(i):
    rewrite(i, **{i.pick("env_spec", "eval_env_spec"): json.dumps(i.pick(*ODD_SPECS))})
    if i.rng.random() < 0.5: return "right"                                            # named, but not needed
    rewrite(i, observation_space="", env_spec=json.dumps(i.pick(*ODD_SPECS)))          # needed
    return "refused"


def no_json(i):
    body = i.json.read_bytes()
    i.json.write_bytes(i.pick(body[:i.rng.integers(len(body) - 1)], b"\xff\xfe" + body, DEEP.encode(), b"[]", b"",
                              b"{" + body))
    return "refused"


def json_bits(i):
    flip(i.json, i.rng)
    return "any"


def other_episodes(i):
    "Some are missing, there are more, or they are not what they should be."
    k, last = i.rng.integers(len(LENGTHS)), len(LENGTHS) - 1
    with h5py.File(i.data, "a") as f:
        i.pick(lambda: f.__delitem__(f"episode_{k}"), lambda: f.move(f"episode_{last}", "episode_9"),
               lambda: f.copy("episode_0", "episode_3"),
               lambda: f.copy("episode_0", "other"), lambda: (f.__delitem__(f"episode_{k}"),
                                                              f.create_group(f"episode_{k}")),
               lambda: (f.__delitem__(f"episode_{k}"), f.__setitem__(f"episode_{k}", f[f"episode_{(k + 1) % 3}"])),
               lambda: (f.__delitem__(f"episode_{k}"), f.__setitem__(f"episode_{k}", h5py.SoftLink("/episode_0"))),
               lambda: (f.__delitem__(f"episode_{k}"), f.__setitem__(f"episode_{k}", np.zeros(3))),
               lambda: shorten(f[f"episode_{k}"], 1), lambda: shorten(f[f"episode_{k}"],
                                                                      len(f[f"episode_{k}/rewards"])),
               lambda: emptied(f[f"episode_{k}"]),
               lambda: f[f"episode_{k}"].__delitem__(i.pick("rewards", "actions", "terminations")))()
    return "refused"


def shorten(group, steps):
    "All columns of an episode alike."
    def cut(name, x):
        if isinstance(x, h5py.Dataset): x.resize(len(x) - steps, 0)
    group.visititems(cut)


def emptied(group): group["rewards"].resize(0, 0)


def folder_links(i):
    "Files of the set that lie elsewhere, are no files, or are gone."
    other, data = i.folder / "elsewhere", i.path / "data"
    file = i.pick(i.json, i.data)
    def away(path):
        path.rename(other)
        path.symlink_to(other)
    i.pick(lambda: away(file), lambda: away(data), file.unlink, lambda: (file.unlink(), file.mkdir()),
           lambda: (file.unlink(), os.mkfifo(file)),
           lambda: (file.unlink(), file.symlink_to("/etc/passwd")), lambda: (file.unlink(), file.symlink_to(file)),
           lambda: (data / "more").symlink_to("/etc"), lambda: (file.unlink(), file.symlink_to(other)))()
    return "refused"


# ---- bytes

def flip(path, rng, stretch=None):
    body = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 5)): body[rng.integers(min(stretch or len(body), len(body)))] ^= 1 << rng.integers(8)
    path.write_bytes(body)


def checksums(i): return "same" if i.npz or "checked" in i.kind else "any"


def bits(i):
    flip(i.data, i.rng, i.pick(None, None, 100, 2500))
    return checksums(i)


def zeros(i):
    body = bytearray(i.data.read_bytes())
    at, n = i.rng.integers(len(body)), int(i.rng.integers(1, 300))
    body[at: at + n] = i.pick(bytes(n), b"\xff" * n, i.rng.bytes(n))[: len(body) - at]
    i.data.write_bytes(body)
    return checksums(i)


def shifted(i):
    "A stretch taken out, put in or copied elsewhere."
    body = i.data.read_bytes()
    a, b, n = (int(i.rng.integers(len(body))) for _ in range(3))
    part = body[b: b + n % 500]
    i.data.write_bytes(i.pick(body[:a] + body[a + n % 99 + 1:], body[:a] + part + body[a:],
                              body[:a] + part + body[a + len(part):]))
    return checksums(i)


def truncated(i):
    body = i.data.read_bytes()
    n = i.pick(len(body) - 1, len(body) // 2, int(i.rng.integers(len(body))), 0, 8)
    i.data.write_bytes(body[:n])
    return "refused"


def no_data(i):
    i.data.write_bytes(i.pick(b"", b"hello\n" * 99, b"\x1f\x8b" + i.rng.bytes(500), b"\x89HDF\r\n\x1a\n" + bytes(99),
                              b"PK\x05\x06" + bytes(18),
                              b"PK\x03\x04" + i.rng.bytes(99), i.rng.bytes(2000), b"<html>log in</html>",
                              b"\x93NUMPY" + bytes(99)))
    return "refused"


def missing(i):
    if i.npz:
        key = i.pick("observations", "actions", "rewards", "terminals")
        write_zip(i.path, [(k, x) for k, x in i.members().items() if k != key + ".npy"])
        return "refused"
    group, key = i.array()
    with h5py.File(i.data, "a") as f: del f[group + key]
    return "refused"


BYTES = (bits, bits, zeros, shifted, truncated, no_data)
TABLES = (other_form, wrong_array, wrong_array, missing)
MUTATIONS = {
    "hdf5": BYTES + (*TABLES, harmless_hdf5, strange_hdf5, strange_hdf5), "checked.hdf5": BYTES,
    "chunked.hdf5": BYTES + (strange_hdf5,), "npz": BYTES + (*TABLES, harmless_npz, strange_npz, strange_npz,
                                                             packed_otherwise),
    "ogbench.npz": BYTES + (*TABLES, harmless_npz, strange_npz, packed_otherwise),
    **dict.fromkeys(("minari flat", "minari dict"), BYTES + (*TABLES, harmless_hdf5, strange_hdf5, metadata, metadata,
                                                             spaces, spaces,
                                                             specification, no_json, json_bits, other_episodes,
                                                             folder_links))}


# ---- the verdict

def differs(data, want):
    "Which fields are not as they should be; the successor of a terminal row may be anything."
    found = {k: getattr(data, k).numpy() for k in FIELDS}
    if any(found[k].shape != want[k].shape for k in FIELDS): return list(FIELDS)
    live = want["terminal"] == 0
    return [k for k in FIELDS if (found[k] != want[k])[live if k == "next_obs" else ...].any()]


def judge(i, right):
    "(verdict, what is wrong with it or None) of loading an input."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = load(i.name, **i.kwargs)
    except DataError as e:
        said, plain = str(e), all(c.isprintable() or c == "\n" for c in str(e))
        if str(i.name) not in said: return "refused", f"does not name the file: {said[:200]}"
        if not plain or len(said) > 5000: return "refused", "a message that is no text"
        return "refused", f"good data refused: {said[:300]}" if right == "right" else None
    except Exception as e: return "crashed", f"{type(e).__name__}: {str(e)[:200]}"
    wrong = differs(data, i.want)
    verdict = "other" if wrong else "right"
    if right == "refused": return verdict, "silently accepted" + ", with the right numbers" * (not wrong)
    if right in ("right", "same") and wrong: return "other", f"other numbers in {wrong}"
    return verdict, None


def make(bases, seed, k, folder, only=None):
    "Input k of a seed, and what is right for it; with `only` a mutation of that name."
    rng = np.random.default_rng([seed, k])
    faults = {kind: [m for m in MUTATIONS[kind] if only in (None, m.__name__)] for kind in bases}
    kinds = [kind for kind in bases if faults[kind]]
    kind = kinds[rng.integers(len(kinds))]
    i = Input(kind, *bases[kind], folder, rng)
    mutate = i.pick(*faults[kind])
    said = f"seed {seed}, input {k}: {kind}, {mutate.__name__}"
    (folder / "now.txt").write_text(said)                                              # should the process die of it
    before = i.data.read_bytes()
    right = mutate(i)
    if right == checksums(i) and mutate != json_bits and i.data.read_bytes() == before: right = "right"
    return i, mutate, right


def one(seed, k, folder):
    "Input k of a seed, alone: (Input, its mutation, what is right, verdict, fault)."
    folder = Path(folder)
    i, mutate, right = make(write_bases(folder), seed, k, folder)
    return i, mutate.__name__, right, *judge(i, right)


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if resource else 0.0


def fuzz(count: int, seed: int, folder, only: str | None = None) -> dict:
    "Load `count` odd inputs; how many were read rightly, read otherwise, refused; what went wrong; memory in MB."
    folder = Path(folder)
    root, begin = os.environ.get("MINARI_DATASETS_PATH"), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bases = write_bases(folder)
    counts, kinds, bad, slowest, first = Counter(), Counter(), [], 0.0, peak()
    for k in range(count):
        i, mutate, right = make(bases, seed, k, folder, only)
        start, memory = time.process_time(), peak()
        verdict, fault = judge(i, right)
        took, grown = time.process_time() - start, peak() - memory
        if not fault and took > 10: fault = f"took {took:.0f} s"
        if not fault and grown > 300: fault = f"took {grown:.0f} MB"
        slowest = max(slowest, took)
        counts[verdict] += 1
        kinds[f"{mutate.__name__}: {right}: {verdict}"] += 1
        if fault: bad.append(f"seed {seed}, input {k}: {i.kind}, {mutate.__name__}, {right}: {fault}")
    if (Path.cwd() / "owned").exists(): bad.append("a file ran a command")
    if root is None: os.environ.pop("MINARI_DATASETS_PATH", None)
    else: os.environ["MINARI_DATASETS_PATH"] = root
    return dict(count=count, seed=seed, seconds=time.perf_counter() - begin, right=counts["right"],
                refused=counts["refused"],
                other=counts["other"], crashed=counts["crashed"], kinds=dict(sorted(kinds.items())), bad=bad,
                slowest_s=slowest, peak_mb=peak(), grown_mb=peak() - first)
