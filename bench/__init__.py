"""The ops beside what people use instead: error, time, memory and distance from the limit, measured in one run."""
