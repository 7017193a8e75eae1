package main

import (
	"os"
	"strings"
	"testing"
)

func TestScale(t *testing.T) {
	rep := testReport()
	rep.Scale = []scaleRow{
		{What: "a", Unit: "MiB", Values: []float64{39, 50, 30}, Bound: 40},
		{What: "b", Unit: "s", Values: []float64{1.1, 1.2, 0.9}, Bound: 1},
		{What: "c", Unit: "x", Values: []float64{0.95, 0.5, 1.5}, Bound: 1, AtLeast: true},
		{What: "d", Unit: "x", Values: []float64{0.5, 0.5, 1.5}, Bound: 1, AtLeast: true},
	}
	page := rep.markdown(rep.results())
	for _, s := range []string{
		"| a | 39 (30..50) MiB | at most 40 | met |", "| b | 1.1 (0.9..1.2) s | at most 1 | **missed** |",
		"| c | 0.95 (0.5..1.5) x | at least 1 | met |", "| d | 0.5 (0.5..1.5) x | at least 1 | **missed** |",
	} {
		if !strings.Contains(page, s) {
			t.Errorf("the page does not say %q", s)
		}
	}
}

func TestCollection(t *testing.T) {
	if n := collection("gc 1 @0.010s 3%: 0.01+1\nhello\ngc 12 @10.5s 1%: 0.02+0.3\n"); n != 1 {
		t.Error(n)
	}
	if n := collection("no garbage"); n != 0 {
		t.Error(n)
	}
}

func TestProcessorTicks(t *testing.T) {
	if d, err := processorTime(os.Getpid()); err != nil || d <= 0 {
		t.Errorf("%v, %v", d, err)
	}
}
