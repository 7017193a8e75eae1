package main

import "time"

// handoverReport is what was measured of handovers.
type handoverReport struct {
	When     time.Time      `json:"when"`
	Machine  machine        `json:"machine"`
	Time     time.Duration  `json:"time_ns"` // for each cell
	Cells    []handoverCell `json:"cells"`
	Commands []string       `json:"commands"`
	Moves    []*moves       `json:"moves"`
}
