"""One process of an FSDP training under `fp8_transform`; see `test_processes.py`.

    python tests/processes/train.py RANK PROCESSES DEVICES PORT FOLDER

Trains in FP8 and as it is. Writes FOLDER.RANK.json, of each: losses as hexadecimal
floats, digests of the parameters, and whether a checkpoint that all processes saved
brings the same bits and the same next loss back.
"""

import hashlib
import json
import os
import pathlib
import sys
from typing import Any

STEPS, TOKENS, D, HIDDEN = 3, 512, 256, 512


def start(rank: int, processes: int, devices: int, port: int) -> None:
    """Joins the other processes. Before JAX is used for anything else."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)


def train(folder: str, use_fp8: bool) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import orbax.checkpoint as ocp
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import fp8jax

    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

    def put(x: Any) -> Any:
        x = np.asarray(x, np.float32)
        sharding = rows if x.ndim else everywhere
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    rng = np.random.default_rng(0)
    params = {
        "up": rng.normal(size=(D, HIDDEN)) * D**-0.5,
        "down": rng.normal(size=(HIDDEN, D)) * HIDDEN**-0.5,
    }
    batch = [put(rng.normal(size=(TOKENS, D))) for _ in range(2)]
    optimizer = optax.sgd(0.3, momentum=0.9)
    params = jax.tree.map(put, params)
    state = params, optimizer.init(params)
    shards = jax.tree.map(lambda _: rows, state)

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, moments = state

        def loss(params: Any) -> jax.Array:
            h = jax.nn.gelu(x @ params["up"])
            return jnp.mean((h @ params["down"] - y) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), value

    run: Any = jax.jit(
        step,
        in_shardings=(shards, rows, rows),
        out_shardings=(shards, everywhere),
        donate_argnums=0,
    )
    run = fp8jax.fp8_transform(run) if use_fp8 else run
    found: dict[str, Any] = {"losses": []}
    if use_fp8:
        found["fraction"] = run.report(state, *batch).fraction
    for _ in range(STEPS):
        state, value = run(state, *batch)
        found["losses"].append(float(value).hex())

    def digests(state: Any) -> list[str]:
        if jax.process_count() > 1:
            state = multihost_utils.process_allgather(state, tiled=True)
        arrays = map(np.ascontiguousarray, jax.tree.leaves(jax.device_get(state)))
        return [hashlib.sha256(a.tobytes()).hexdigest() for a in arrays]

    found["digests"] = digests(state)
    found["sharding"] = str(state[0]["up"].sharding.spec)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(folder, target)
    found["restored"] = digests(restored) == found["digests"]
    found["resumed"] = [float(run(s, *batch)[1]).hex() for s in (state, restored)]
    return found


if __name__ == "__main__":
    rank, processes, devices, port = map(int, sys.argv[1:5])
    start(rank, processes, devices, port)
    folder = sys.argv[5]
    found = {
        name: train(f"{folder}_{name}", use_fp8=name == "fp8")
        for name in ("fp8", "plain")
    }
    pathlib.Path(f"{folder}.{rank}.json").write_text(json.dumps(found))
