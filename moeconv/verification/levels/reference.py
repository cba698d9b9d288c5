"""What the levels of running models compare with, and the checks that speak of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from moeconv.errors import MoeconvError
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CandidateError, Check, CheckFactory
from moeconv.verification.context import Verification
from moeconv.verification.levels.config_parity import check_config_parity
from moeconv.verification.measure.rounding import Rounding, roundings
from moeconv.verification.models.maxtext_layers import MaxTextLayers, ReadParameter
from moeconv.verification.models.reference import ReferenceConfig, reference_config
from moeconv.verification.models.run_layers import moved
from moeconv.verification.models.transformers import HfLayers, rounding_between
from moeconv.verification.settings import ParityOptions


@dataclass(frozen=True)
class Reference:
    """The right model, as far as it is known before it runs.

    Attributes:
        of: The level.
        candidate: The output.
        options: What the user chose.
        config: MaxText's config; None for another Hugging Face model.
    """

    of: CheckFactory
    candidate: Candidate
    options: ParityOptions
    config: ReferenceConfig | None

    @classmethod
    def find(cls, run: Verification, of: CheckFactory) -> "Reference":
        """The model that `--against` names; of MaxText the run's config is read.

        Raises:
            ConfigError: It cannot be read.
            MoeconvError: The checkpoint is not there.
        """
        candidate, options = run.candidate, run.options.parity
        if options.against is not None:
            return cls(of, candidate, options, None)
        accepted = [*candidate.manifest.accepted_keys, *options.accept]
        config = reference_config(
            candidate.model,
            candidate.layout,
            candidate.step,
            options.config,
            accepted,
            merged=candidate.manifest.adapter is not None,
        )
        return cls(of, candidate, options, config)

    @property
    def origin(self) -> str:
        """Where its config came from, for people."""
        return "its own config.json" if self.config is None else self.config.origin

    def description(self) -> list[Check]:
        """The check of the output's description against the run's config, if there is one.

        Raises:
            CandidateError: The config is of another model than the output's.
        """
        if self.config is None:
            return []
        try:
            return check_config_parity(self.of, self.candidate, self.config)
        except MoeconvError as error:
            raise CandidateError(str(error), "description") from None

    def check(self, name: str) -> Check:
        """What a level compared with.

        It warns where the reference's config is that of the conversion, and where the meaning of
        some settings of the run's config is not known.

        Args:
            name: The model's name.
        """
        independent = self.config is None or self.config.independent
        accepted = () if self.config is None else self.config.resolved.accepted
        summary = f"{name}, by {self.origin}"
        if not independent:
            summary += (
                ": a value that the conversion was given wrong (rope_theta, say) is wrong there "
                "too and cannot be found; give the run's own config with --config"
            )
        if accepted:
            summary += f"; what {', '.join(accepted)} in its config means is not known"
        metrics = {
            "against": self.options.reference_kind,
            "config": self.origin,
            "independent": independent,
        }
        make = self.of.passed if independent and not accepted else self.of.warned
        return make("reference", summary, metrics=metrics)

    def weights(self) -> Mapping[str, Rounding]:
        """How the output rounds the checkpoint's arrays, by name."""
        return roundings(self.candidate.edges.values())

    def rounded_maxtext(self, read: ReadParameter) -> MaxTextLayers | None:
        """MaxText as the output rounds it; None where rounding plays no part."""
        assert self.config is not None
        weights, dtype = self.weights(), self.options.dtype
        if not weights and dtype == "float32":
            return None
        layout = self.candidate.layout
        weighed = moved(read, layout, weights)
        return MaxTextLayers(self.config.keys, weighed, layout, dtype=dtype)

    def rounded_transformers(self) -> HfLayers | None:
        """The other Hugging Face model as the output rounds it; None where that plays no part."""
        assert self.options.against is not None
        rounding = rounding_between(self.options.against, self.candidate.out)
        if rounding is None and self.options.dtype == "float32":
            return None
        return HfLayers(self.options.against, dtype=self.options.dtype, rounding=rounding)
