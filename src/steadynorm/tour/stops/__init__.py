"""The stops of the tour, in order."""

from steadynorm.tour.stop import Stop
from steadynorm.tour.stops.calibration import Calibration
from steadynorm.tour.stops.doctor import Doctor
from steadynorm.tour.stops.drop_in import DropIn
from steadynorm.tour.stops.folding import Folding
from steadynorm.tour.stops.small_batches import SmallBatches
from steadynorm.tour.stops.speed import Speed

STOPS: tuple[Stop, ...] = (
    DropIn(),
    SmallBatches(),
    Doctor(),
    Calibration(),
    Folding(),
    Speed(),
)
