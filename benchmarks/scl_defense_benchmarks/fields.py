"""Option fields that the same attack of several libraries shares, so that one name means one thing everywhere."""

from typing import Annotated

from scl_defense.types import Field

Steps = Annotated[int, Field(ge=1, le=100_000, description="gradient steps")]
RelStep = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False, description="length of a step in units of eps")]
RandomStart = Annotated[bool, Field(description="start at a random point of the ball, else at the image itself")]
EarlyStop = Annotated[bool, Field(description="a fooled image stays where it is, and costs no more")]
Restarts = Annotated[int, Field(ge=1, le=1000, description="random starts, each on what is not broken yet")]
Targets = Annotated[int, Field(ge=1, le=10_000, description="other classes aimed at, the likeliest first")]
Queries = Annotated[int, Field(ge=1, le=10_000_000, description="points tried an image")]
Limit = Annotated[int, Field(ge=1, le=10_000_000, description="more images than this are refused: it is slow")]
