package main

import (
	"maps"
	"math/rand/v2"
	"slices"
)

// stat sums up the rounds of one figure.
type stat struct{ Median, Min, Max float64 }

func newStat(v []float64) stat {
	if len(v) == 0 {
		return stat{}
	}
	return stat{median(v), slices.Min(v), slices.Max(v)}
}

// median of v, 0 of nothing.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	return middle(slices.Sorted(slices.Values(v)))
}

// middle is the median of what is sorted and not empty.
func middle(s []float64) float64 {
	h := len(s) / 2
	if len(s)%2 == 1 {
		return s[h]
	}
	return (s[h-1] + s[h]) / 2
}

// ratio is the median of ratios paired by round, and a 90 % interval of it.
type ratio struct{ Median, Low, High float64 }

func (r ratio) known() bool { return r.Median > 0 }

// resamples of a bootstrap.
const resamples = 10000

// newRatio makes the interval by the percentile bootstrap, with a fixed seed:
// the same figures give the same report.
func newRatio(v []float64) ratio {
	if len(v) == 0 {
		return ratio{}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	medians := make([]float64, resamples)
	draw := make([]float64, len(v))
	for i := range medians {
		for j := range draw {
			draw[j] = v[rng.IntN(len(v))]
		}
		slices.Sort(draw)
		medians[i] = middle(draw)
	}
	slices.Sort(medians)
	return ratio{median(v), medians[resamples*5/100], medians[resamples*95/100-1]}
}

// paired are the quotients of a and b, round by round; rounds that miss one of
// them are left out.
func paired(a, b map[int]float64) []float64 {
	var v []float64
	for _, round := range slices.Sorted(maps.Keys(a)) {
		if x, y := a[round], b[round]; x > 0 && y > 0 {
			v = append(v, x/y)
		}
	}
	return v
}

// nearGoal is the goal below which noise decides, so that the interval counts.
const nearGoal = 1.3

// meets says whether goal is reached.
func (r ratio) meets(goal float64) bool {
	if goal < nearGoal {
		return r.High >= goal
	}
	return r.Median >= goal
}
