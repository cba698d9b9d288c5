"""Both models through their layers, one layer at a time and in step.

Every layer of the converted model is run on the reference's hidden states, so that what differs
came from this very layer, and on its own, so that the growth of the difference is seen.
"""

from dataclasses import dataclass

import numpy as np

from moeconv.tensor.axes import Array
from moeconv.verification.checks import Status
from moeconv.verification.levels.hidden import PARTS, Place
from moeconv.verification.measure.metrics import demand_finite
from moeconv.verification.measure.routing import Choice, Routing, compare_routing
from moeconv.verification.models.layerwise import LayerTrace, LayerwiseModel
from moeconv.verification.settings import Note


@dataclass(frozen=True)
class Models:
    """What runs.

    Attributes:
        name: The reference's name.
        reference: The right model.
        rounded: The same, moved as the output rounds it; None where rounding plays no part.
        converted: The converted model.
        choice: How all of them choose experts.
        norm_factor: The reference's final norm times this is the converted model's; None where the
            two are not compared.
    """

    name: str
    reference: LayerwiseModel
    rounded: LayerwiseModel | None
    converted: LayerwiseModel
    choice: Choice
    norm_factor: float | None


@dataclass(frozen=True)
class Hidden:
    """Hidden states [B, T, D] between two layers: each model's own."""

    reference: Array
    converted: Array
    rounded: Array | None


class Lockstep:
    """The models on their way, and what was found on it.

    Attributes:
        places: Every tensor that was compared, in order.
        routers: Router scores [B, T, E] of each model on its own hidden states, by layer; those of
            `rounded` are empty where there is no such model.
    """

    def __init__(self, models: Models) -> None:
        """Nothing is run yet."""
        self._models = models
        self.places: list[Place] = []
        self.routers: dict[str, dict[int, Array]] = {"reference": {}, "converted": {}}
        if models.rounded is not None:
            self.routers["rounded"] = {}

    def run(self, tokens: Array, note: Note) -> Hidden:
        """Embedding and every layer of `tokens` [B, T]; returns what the last layer gave.

        Raises:
            TensorError: A value of the reference is NaN or infinite.
        """
        models = self._models
        reference = models.reference.embed(tokens)
        demand_finite(reference, f"the embeddings of {models.name}")
        converted = models.converted.embed(tokens)
        rounded = models.rounded.embed(tokens) if models.rounded is not None else None
        self.places.append(
            Place.compare("embedding", None, reference, converted, converted, rounded)
        )
        for model in (models.reference, models.converted, models.rounded):
            if model is not None:
                model.release()
        hidden = Hidden(reference, converted, rounded)
        for number in range(models.reference.num_layers):
            note(f"layer {number} ({number + 1} of {models.reference.num_layers})")
            hidden = self._layer(number, hidden)
        return hidden

    def norm(self, hidden: Hidden) -> None:
        """Compares the final norm, if it can be."""
        models = self._models
        if models.norm_factor is None:
            return
        factor = np.float32(models.norm_factor)
        expected = models.reference.norm(hidden.reference) * factor
        rounded = None
        if models.rounded is not None:
            rounded = models.rounded.norm(hidden.reference) * factor
        local = models.converted.norm(hidden.reference)
        own = models.converted.norm(hidden.converted)
        self.places.append(Place.compare("final norm", None, expected, local, own, rounded))

    def _layer(self, number: int, hidden: Hidden) -> Hidden:
        models, batch = self._models, len(hidden.reference)
        exact = models.reference.layer(number, hidden.reference)
        _demand_finite(exact, f"of {models.name}", number)
        found = models.converted.layer(number, np.concatenate([hidden.reference, hidden.converted]))
        other = None
        if models.rounded is not None and hidden.rounded is not None:
            both = np.concatenate([hidden.reference, hidden.rounded])
            other = models.rounded.layer(number, both)
            _demand_finite(other, f"of {models.name}, rounded as the output is,", number)
        settled = self._routing(number, batch, exact, found, other)
        for part in PARTS:
            expected, got = getattr(exact, part), getattr(found, part)
            if expected is None or got is None:
                continue  # a dense layer written as copies has an idle router here, none there
            masks = settled if part in ("experts", "output") else (None, None)
            rounded = getattr(other, part)[:batch] if other is not None else None
            self.places.append(
                Place.compare(part, number, expected, got[:batch], got[batch:], rounded, masks)
            )
        return Hidden(
            exact.output,
            found.output[batch:],
            other.output[batch:] if other is not None else None,
        )

    def _routing(
        self,
        number: int,
        batch: int,
        exact: LayerTrace,
        found: LayerTrace,
        other: LayerTrace | None,
    ) -> tuple[Array | None, Array | None]:
        """Keeps the router's scores; where no near-tie flipped, of the converted and the rounded.

        The first `batch` rows of `found` and `other` were given the reference's hidden states.
        """
        if exact.router is None or found.router is None:
            return None, None
        rounding = settled_rounded = None
        if other is not None and other.router is not None:
            rounding, settled_rounded = self._settled(exact.router, other.router[:batch], None)
            self.routers["rounded"][number] = other.router[batch:]
        _, settled = self._settled(exact.router, found.router[:batch], rounding)
        self.routers["reference"][number] = exact.router
        self.routers["converted"][number] = found.router[batch:]
        return settled, settled_rounded

    def _settled(
        self, reference: Array, other: Array, rounding: Routing | None
    ) -> tuple[Routing, Array]:
        """Routing of one layer given the same input, and where no near-tie flipped."""
        choice = self._models.choice
        found = compare_routing(
            {0: reference},
            {0: other},
            choice=choice,
            shape=(reference.shape[0], reference.shape[1]),
            rounded=self._models.rounded is not None,
            rounding=rounding,
        )
        flipped = (choice.chosen(reference) != choice.chosen(other)).any(axis=-1)
        explained = found.layers[0].status is Status.PASS
        return found, ~flipped if explained else np.ones_like(flipped)


def _demand_finite(trace: LayerTrace, whose: str, layer: int) -> None:
    """Raises as `demand_finite`, of each part of a layer."""
    for part in PARTS:
        if (values := getattr(trace, part)) is not None:
            demand_finite(values, f"{part} values {whose} in layer {layer}")
