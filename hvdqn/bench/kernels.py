"""`hvdqn bench kernels`: compare the time of an update of a small network with that of its bare matrix products.

The products are those of the update, of the same shapes, in memory allocated before. The measurements alternate, call
by call. Only networks that `hvdqn/dense_update.py` covers can be measured: small fully connected ones on the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from hvdqn.bench.report import Parser, one_or_more, print_table, write_json
from hvdqn.bench.training import acting_parts, build_filled_parts, update
from hvdqn.config import Config, check_engine, parse
from hvdqn.dense_update import DenseUpdate
from hvdqn.errors import UserError
from hvdqn.networks.dense import DenseNetwork
from hvdqn.process import flush_denormals, keep_freed_memory

PROG = "hvdqn bench kernels"
WARM_UP_CALLS = 50

Product = tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]


def products_of(dense: DenseUpdate, batch: int) -> list[Product]:
    """Return the two factors and the result of every matrix product of one update with a minibatch of this size."""
    observations = 2 * batch
    online, target = observations if dense.double else batch, batch
    if dense.config.munchausen:
        target = observations
    forward = [*forward_products(dense.online, online), *forward_products(dense.target, target)]
    return [*forward, *backward_products(dense.online, batch)]


def forward_products(network: DenseNetwork, rows: int) -> Iterator[Product]:
    """Yield the products H W^T of a forward pass."""
    for stack in (network.trunk, *(network.streams or ())):
        for layer in stack.layers:
            weight = np.ones_like(layer.weight)
            units, inputs = weight.shape
            yield np.ones((rows, inputs), weight.dtype), weight.T, np.empty((rows, units), weight.dtype)


def backward_products(network: DenseNetwork, rows: int) -> Iterator[Product]:
    """Yield the products D^T H and, but for a network's first layer, D W of a backward pass."""
    for stack in (network.trunk, *(network.streams or ())):
        has_inputs = stack is not network.trunk and bool(network.trunk.layers)
        for index, layer in enumerate(stack.layers):
            weight = np.ones_like(layer.weight)
            units, inputs = weight.shape
            h, d = np.ones((rows, inputs), weight.dtype), np.ones((rows, units), weight.dtype)
            yield d.T, h, np.empty_like(weight)
            if index or has_inputs:
                yield d, weight, np.empty_like(h)


def time_alternately(functions: Sequence[Callable[[], object]], calls: int) -> list[float]:
    """Return the median seconds of a call of each function."""
    times: list[list[float]] = [[] for _ in functions]
    for call in range(WARM_UP_CALLS + calls):
        for function, seconds in zip(functions, times, strict=True):
            began = time.perf_counter()
            function()
            if call >= WARM_UP_CALLS:
                seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in times]


def measure(config: Config, calls: int) -> dict[str, float]:
    """Return the median seconds of an update, of its gradient alone, and of its bare matrix products.

    Raises:
        UserError: the update computes its gradient by autograd.
    """
    batch_size = config.replay.batch_per_rank
    parts = build_filled_parts(config, 2 * batch_size // config.environment.envs_per_rank + 20)
    try:
        batch, learner = acting_parts(parts).replay.sample(batch_size), parts.learner
        if learner.dense is None:
            raise UserError(
                "this network learns by autograd; choose a small fully connected one, as --preset cartpole"
            )
        products = products_of(learner.dense, batch_size)

        def multiply() -> None:
            for left, right, result in products:
                np.matmul(left, right, out=result)

        functions = (lambda: update(parts, batch), lambda: learner.compute_gradient(batch), multiply)
        return dict(zip(("update", "gradient", "products"), time_alternately(functions, calls), strict=True))
    finally:
        acting_parts(parts).envs.close()


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn bench kernels` command; return the exit code.

    Raises:
        UserError: the input is wrong, or the network is not a small one.
    """
    parser = Parser(PROG, __doc__, "bench-kernels.json")
    parser.add_argument("--calls", type=one_or_more, default=2_000, help="timed calls of each")
    options, flags = parser.parse_known_args(argv)
    config = parse(flags, PROG)
    check_engine(config, "local", 1)
    flush_denormals()  # as training does, and the next
    keep_freed_memory()
    seconds = measure(config, options.calls)
    ratio = seconds["update"] / seconds["products"]
    names = {
        "update": "update: gradient, exchange with one rank, optimizer step",
        "gradient": "gradient of a minibatch",
        "products": "bare matrix products of an update",
    }
    rows = [
        (names[key], f"{1e6 * value:,.0f}", f"{value / seconds['products']:.2f}")
        for key, value in seconds.items()
    ]
    print_table(f"Update over its matrix products: {ratio:.2f}", ("what", "us", "over products"), rows)
    write_json(options.json, {"seconds": seconds, "ratio": ratio})
    return 0
