"""What may lie beside the files of the manifest: what verify and push write, and what people add.

Below both of them: structure takes none of these for a stranger, and push sends nothing else.
"""

CARD_NAME = "README.md"
LOSS_PLOT = "training_loss.png"
# What people add.
LEGAL = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
VERDICT = (
    "verify.json",
    "verify.md",
    "verify_kl_by_position.png",
    "verify_error_by_layer.png",
    "verify_logits.png",
)
# What push takes from the disk.
ALLOWED = (CARD_NAME, *VERDICT, *LEGAL)
# What it makes on the way, and what the Hub and a download from it leave in a folder.
KNOWN = (*ALLOWED, LOSS_PLOT, ".gitattributes", ".cache")
