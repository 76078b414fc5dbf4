"""The stops of the tour, in order."""

from steadynorm.evidence.tour.stop import Stop
from steadynorm.evidence.tour.stops.calibration import Calibration
from steadynorm.evidence.tour.stops.doctor import Doctor
from steadynorm.evidence.tour.stops.drop_in import DropIn
from steadynorm.evidence.tour.stops.folding import Folding
from steadynorm.evidence.tour.stops.small_batches import SmallBatches
from steadynorm.evidence.tour.stops.speed import Speed

STOPS: tuple[Stop, ...] = (
    DropIn(),
    SmallBatches(),
    Doctor(),
    Calibration(),
    Folding(),
    Speed(),
)
