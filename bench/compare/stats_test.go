package main

import (
	"math"
	"testing"
)

func TestStat(t *testing.T) {
	for _, c := range []struct {
		v    []float64
		want stat
	}{
		{nil, stat{}},
		{[]float64{3}, stat{3, 3, 3}},
		{[]float64{4, 1}, stat{2.5, 1, 4}},
		{[]float64{9, 1, 5}, stat{5, 1, 9}},
		{[]float64{4, 3, 2, 1}, stat{2.5, 1, 4}},
	} {
		if got := newStat(c.v); got != c.want {
			t.Errorf("%v: %v, want %v", c.v, got, c.want)
		}
	}
	v := []float64{3, 1, 2}
	if median(v); v[0] != 3 {
		t.Error("median sorts its argument")
	}
}

func TestRatio(t *testing.T) {
	if r := newRatio(nil); r.known() {
		t.Error("a ratio of nothing is known")
	}
	if r := newRatio([]float64{2}); r != (ratio{2, 2, 2}) {
		t.Error(r)
	}
	if r := newRatio([]float64{2, 2, 2, 2, 2, 2, 2}); r != (ratio{2, 2, 2}) {
		t.Error(r)
	}
	v := []float64{1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6}
	r := newRatio(v)
	if r != newRatio(v) {
		t.Error("not the same twice")
	}
	// The median of 7 draws is at most the i-th value if 4 draws or more are:
	// 5.9 % of the resamples have a median of 1.1 or less, 1.4 % one of 1.0.
	if r.Median != 1.3 || r.Low != 1.1 || r.High != 1.5 {
		t.Error(r)
	}
	// One wild round does not move the median, and hardly the interval.
	if wild := newRatio([]float64{1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 50}); wild.Median != 1.3 || wild.High > 1.5 {
		t.Error(wild)
	}
}

func TestPaired(t *testing.T) {
	a := map[int]float64{0: 8, 1: 6, 2: 4, 3: 9}
	b := map[int]float64{0: 2, 1: 3, 3: 0, 4: 1}
	got := paired(a, b)
	if len(got) != 2 || got[0] != 4 || got[1] != 2 {
		t.Error(got)
	}
	// Pairing takes out what disturbs a whole round.
	if r := newRatio(paired(map[int]float64{0: 10, 1: 1, 2: 100}, map[int]float64{0: 5, 1: 0.5, 2: 50})); r != (ratio{2, 2, 2}) {
		t.Error(r)
	}
}

func TestMeets(t *testing.T) {
	for _, c := range []struct {
		r    ratio
		goal float64
		want bool
	}{
		{ratio{2, 1.9, 2.1}, 2, true},
		{ratio{1.99, 1.9, 2.1}, 2, false}, // large goals are for the median
		{ratio{1.29, 1.2, 1.4}, 1.3, false},
		{ratio{1.05, 1.0, 1.1}, 1.1, true}, // small ones for the interval
		{ratio{1.05, 1.0, 1.09}, 1.1, false},
		{ratio{1.5, 1.4, 1.6}, 1.1, true},
		{ratio{math.Inf(1), 1, 1}, 2, true},
	} {
		if got := c.r.meets(c.goal); got != c.want {
			t.Errorf("%v of %v: %v", c.r, c.goal, got)
		}
	}
}
