"""What this device can do at best, measured: a large matmul and a large copy, by JAX.

python _rates.py DTYPE     prints {"flops": …, "bytes": …, "device": …} a second
"""

import json
import sys
import time


def best(function, argument, work: float, seconds: float = 1.0) -> float:
    """The highest rate of some seconds of trying, `work` a call."""
    function(argument).block_until_ready()
    rates, until = [], time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < until:
        begin = time.perf_counter()
        function(argument).block_until_ready()
        rates.append(work / (time.perf_counter() - begin))
    return max(rates)


def main() -> None:
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    large = device.platform != "cpu"
    n, count = (8192, 2**29) if large else (2048, 2**26)
    square = jnp.ones((n, n), sys.argv[1])
    line = jnp.ones(count, jnp.float32)
    rates = {
        "flops": best(jax.jit(lambda x: x @ x), square, 2 * n**3),
        "bytes": best(jax.jit(lambda x: x + 1), line, 2 * 4 * count),
        "device": f"{device.device_kind} ({device.platform})",
    }
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
