"""What no converter can beat: reading the parameters, and writing the bytes.

python _floors.py read ITEMS           every parameter by tensorstore, one at a time, then dropped
python _floors.py write FOLDER SIZE…   files of these sizes, 8 MiB at a time, each synced
"""

import json
import os
import sys
from pathlib import Path

BLOCK = 8 << 20


def read(items: Path) -> None:
    """As fast as tensorstore can: files mapped, no cache, no second look, nothing kept."""
    import tensorstore as ts

    context = ts.Context({"file_io_mode": {"mode": "memmap"}})
    metadata = json.loads((items / "_METADATA").read_text())
    driver = "zarr3" if metadata["use_zarr3"] else "zarr"
    for entry in metadata["tree_metadata"].values():
        keys = [key["key"] for key in entry["key_metadata"]]
        if keys[0] == "params":
            store = {"driver": "ocdbt", "base": f"file://{items}/", "path": ".".join(keys) + "/"}
            spec = {"driver": driver, "kvstore": store}
            ts.open(spec, open=True, context=context).result().read().result()


def write(folder: Path, sizes: list[int]) -> None:
    """Bytes that no file system compresses."""
    block = memoryview(os.urandom(BLOCK))
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        fd = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT, 0o644)
        while size:
            size -= os.write(fd, block[:size])
        os.fsync(fd)
        os.close(fd)


if __name__ == "__main__":
    if sys.argv[1] == "read":
        read(Path(sys.argv[2]).resolve())
    else:
        write(Path(sys.argv[2]), [int(size) for size in sys.argv[3:]])
