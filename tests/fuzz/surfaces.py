"""What is changed: each file that a command reads, its format, and the commands that read it."""

from dataclasses import dataclass

from mutations import CONFIG, JSON, JSON_LINES, SAFETENSORS, Edit, Format, Kind

_RUN = ("inspect", "inspect json", "plan", "convert", "resume", "weights")
_CONVERT = ("plan", "convert", "overwrite")
_OUT = ("structure", "weights", "push plan", "push", "push anyway", "overwrite")
_HALF = ("resume",)
_FOLDERS = ("inspect folders", "convert folders")
_OLDER = ("inspect older", "convert older")


@dataclass(frozen=True)
class Surface:
    """A file to change.

    Attributes:
        file: The file, or folder; a pattern takes the first that there is.
        form: Its format, None for bytes.
        commands: What reads it.
        examples: How many, before `MOECONV_FUZZ` multiplies them.
        full: Commands see every package, transformers among them.
    """

    file: str
    form: Format | None
    commands: tuple[str, ...]
    examples: int = 30
    full: bool = False

    def __str__(self) -> str:
        return f"{self.file}{' (full)' if self.full else ''}"


_STEP = "run/checkpoints/7"
_PARTIAL = "half/.out.moeconv-partial"

SURFACES = (
    # A run.
    Surface("run/moeconv_run.json", JSON, _RUN, 44),
    Surface("run/metrics.jsonl", JSON_LINES, _CONVERT, 16),
    Surface("folders/config.yml", CONFIG, _FOLDERS, 33),
    Surface("run/tokenizer/tokenizer.json", JSON, (*_CONVERT, "weights"), 22),
    Surface("run/tokenizer/tokenizer_config.json", JSON, _CONVERT, 16),
    Surface("run/tokenizer/special_tokens_map.json", JSON, _CONVERT, 8),
    Surface("run/tokenizer/added_tokens.json", JSON, _CONVERT, 8),
    Surface("run/tokenizer/tokenizer.model", None, _CONVERT, 6),
    Surface("ranks.tiktoken", None, ("ranks",), 11),
    # Its checkpoint.
    Surface(f"{_STEP}/items/_METADATA", JSON, _RUN, 33),
    Surface(f"{_STEP}/_CHECKPOINT_METADATA", JSON, _RUN, 16),
    Surface(f"{_STEP}/commit_success.txt", None, _RUN, 4),
    Surface(f"{_STEP}/items/manifest.ocdbt", None, _RUN, 16),
    Surface(f"{_STEP}/items/d/*", None, _RUN, 22),
    Surface("folders/checkpoints/0/items/*gate*/zarr.json", JSON, _FOLDERS, 28),
    Surface("folders/checkpoints/0/items/*wi_0/c/0/0/0/0", None, _FOLDERS, 11),
    Surface("older/checkpoints/0/items/*gate*/.zarray", JSON, _OLDER, 28),
    Surface("older/checkpoints/0/items/*wi_0/0.0.0.0", None, _OLDER, 11),
    # Another thing in the place of a folder.
    Surface("run/tokenizer", None, _CONVERT, 6),
    Surface("run/checkpoints", None, _RUN, 6),
    Surface(_STEP, None, _RUN, 6),
    Surface(f"{_STEP}/items", None, _RUN, 6),
    Surface(f"{_STEP}/items/d", None, _RUN, 6),
    Surface("folders/checkpoints/0/items/*gate*", None, _FOLDERS, 6),
    Surface(_PARTIAL, None, _HALF, 6),
    Surface("out", None, _OUT, 7),
    # A conversion that stopped half way.
    Surface(f"{_PARTIAL}/journal.jsonl", JSON_LINES, _HALF, 28),
    Surface(f"{_PARTIAL}/*.safetensors", SAFETENSORS, _HALF, 11),
    # An output.
    Surface("out/moeconv_manifest.json", JSON, _OUT, 55),
    Surface("out/verify.json", JSON, _OUT, 33),
    Surface("out/config.json", JSON, _OUT, 22),
    Surface("out/generation_config.json", JSON, _OUT, 11),
    Surface("out/model.safetensors.index.json", JSON, _OUT, 16),
    Surface("out/model-00001-of-00002.safetensors", SAFETENSORS, _OUT, 33),
    Surface("out/tokenizer.json", JSON, _OUT, 16),
    Surface("out/tokenizer_config.json", JSON, _OUT, 11),
    Surface("out/README.md", None, ("push plan", "push", "overwrite"), 11),
    # The same with transformers, which reads some of it too.
    Surface("out/config.json", JSON, ("structure",), 16, full=True),
    Surface("out/generation_config.json", JSON, ("structure",), 4, full=True),
    Surface("out/tokenizer.json", JSON, ("structure",), 12, full=True),
    Surface("out/tokenizer_config.json", JSON, ("structure",), 8, full=True),
    Surface("out/moeconv_manifest.json", JSON, ("structure", "push"), 12, full=True),
)

# What was found, by file: the command, the changes, the exit code.
KNOWN = {
    f"{_STEP}/items/manifest.ocdbt": [("inspect", (Kind("huge"),), 3)],
    "folders/checkpoints/0/items/*gate*/zarr.json": [("convert folders", (Kind("huge"),), 3)],
    "older/checkpoints/0/items/*gate*/.zarray": [("inspect older", (Kind("huge"),), 3)],
    "out/generation_config.json": [
        ("structure", (Kind("huge"),), 1),
        ("weights", (Kind("huge"),), 1),
    ],
    "out/model-00001-of-00002.safetensors": [("push anyway", (Kind("huge"),), 6)],
    "run/tokenizer/tokenizer.json": [
        ("weights", (Edit("replace", ("added_tokens",), "false"),), 0)
    ],
}
