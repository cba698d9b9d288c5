"""What every level is given."""

from dataclasses import dataclass
from functools import cached_property

from moeconv.errors import MoeconvError
from moeconv.verification.candidate import Candidate
from moeconv.verification.measure.tokens import Rows, find_sample, make_rows
from moeconv.verification.settings import Meter, Note, VerifyOptions


@dataclass(frozen=True)
class Verification:
    """What a level is given: the candidate, and how it is verified.

    Attributes:
        candidate: The output.
        options: What the user chose.
        note: Called with what is being done.
        meter: Shows how far level weights is.
    """

    candidate: Candidate
    options: VerifyOptions
    note: Note
    meter: Meter

    @cached_property
    def rows(self) -> Rows:
        """The tokens that both models are run on, the same at every level.

        Raises:
            CandidateError: OUT's tokenizer cannot be used.
            UsageError: The user's text cannot be read.
            MoeconvError: The checkpoint, whose run may have a text, is not there.
        """
        candidate, options = self.candidate, self.options.parity
        try:
            step = candidate.step
        except MoeconvError:
            if options.against is None:
                raise
            step = None  # two Hugging Face models are compared without the checkpoint
        return make_rows(
            candidate.tokenizer_folder,
            find_sample(options.prompts, step),
            count=options.tokens,
            vocab_size=candidate.model.vocab_size,
            context=candidate.model.max_position_embeddings,
            eos=candidate.token_id("eos_token_id"),
        )
