from __future__ import annotations

import math

import numpy as np
import pytest
from corral.spec.errors import CheckFailed
from corral.validate import accuracy
from corral.validate.accuracy import measure_accuracy, reblock

from .conftest import FakeBuilds
