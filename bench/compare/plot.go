package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// The plot's measures, in its own units.
const (
	plotWidth = 960
	plotLeft  = 330 // where the scale begins
	plotRight = 770 // where it ends, and figures begin
	rowHeight = 30
	headSpace = 96 // above the first row
)

// plotColours are one set for light and one for dark surroundings. They are
// spelled out in each: not every viewer knows CSS variables.
var plotColours = [2]struct{ back, text, dim, grid, ops, cpu string }{
	{"#fff", "#1f2328", "#59636e", "#d1d9e0", "#0969da", "#bc4c00"},
	{"#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#58a6ff", "#f0883e"},
}

const plotShapes = `text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
.title{font-size:17px;font-weight:600}.head{font-weight:600}.num{text-anchor:end}.mid{text-anchor:middle}
.goal{stroke-width:2}.span{stroke-width:3;opacity:.45;stroke-linecap:round}.dot{stroke-width:2}
`

func plotStyle() string {
	var s strings.Builder
	s.WriteString("<style>\n" + plotShapes)
	for i, c := range plotColours {
		rules := fmt.Sprintf("text{fill:%[2]s}text.dim{fill:%[3]s}.back,.dot.missed{fill:%[1]s}"+
			".grid{stroke:%[4]s}.one{stroke:%[3]s}.goal{stroke:%[2]s}\n"+
			".ops{stroke:%[5]s}.cpu{stroke:%[6]s}.dot.ops.met{fill:%[5]s}.dot.cpu.met{fill:%[6]s}",
			c.back, c.text, c.dim, c.grid, c.ops, c.cpu)
		if i == 1 {
			rules = "@media(prefers-color-scheme:dark){" + rules + "}"
		}
		s.WriteString(rules + "\n")
	}
	s.WriteString("</style>\n")
	return s.String()
}

// plot is an SVG: a line for each cell with both ratios to the better peer, on
// a logarithmic scale.
func (rep *report) plot(results []result) string {
	low, high := scale(results)
	x := func(v float64) float64 {
		v = min(max(v, low), high)
		return plotLeft + (plotRight-plotLeft)*math.Log(v/low)/math.Log(high/low)
	}
	rows := len(results) + len(places(rep.Cells))
	height := headSpace + rows*rowHeight + 20
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`+"\n",
		plotWidth, height, plotWidth, height)
	s.WriteString("<title>nbd-export against the better of qemu-nbd and nbdkit</title>\n" + plotStyle())
	fmt.Fprintf(&s, `<rect class="back" width="%d" height="%d" rx="8"/>`+"\n", plotWidth, height)
	text := func(class string, px, py float64, words string) {
		fmt.Fprintf(&s, `<text class="%s" x="%.1f" y="%.1f">%s</text>`+"\n", class, px, py, html.EscapeString(words))
	}
	line := func(class string, x1, y1, x2, y2 float64) {
		fmt.Fprintf(&s, `<line class="%s" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`+"\n", class, x1, y1, x2, y2)
	}
	dot := func(class string, px, py float64) {
		fmt.Fprintf(&s, `<circle class="dot %s" cx="%.1f" cy="%.1f" r="4.5"/>`+"\n", class, px, py)
	}

	text("title", 20, 30, "nbd-export against the better of qemu-nbd and nbdkit")
	dot("ops met", 26, 50)
	text("", 36, 54.5, "operations per second")
	dot("cpu met", 196, 50)
	text("", 206, 54.5, "operations per CPU time of the server")
	line("goal", 474, 43, 474, 57)
	text("", 482, 54.5, "goal")
	dot("ops missed", 530, 50)
	text("", 540, 54.5, "goal missed")
	line("span ops", 632, 50, 658, 50)
	text("", 666, 54.5, "90 % interval")
	for v := low; v <= high; v *= 2 {
		class := "grid"
		if v == 1 {
			class = "one"
		}
		line(class, x(v), headSpace-8, x(v), float64(height-14))
		text("dim mid", x(v), headSpace-14, fmt.Sprintf("%gx", v))
	}
	text("dim num", 850, headSpace-14, "ops")
	text("dim num", 930, headSpace-14, "CPU")

	y := float64(headSpace)
	rep.byPlace(results, func(title string, of []result) {
		y += rowHeight
		text("head", 20, y-8, title)
		for _, r := range of {
			y += rowHeight
			middle := y - rowHeight/2
			text("", 32, middle+4.5, r.Title())
			for _, v := range []struct {
				class string
				shift float64
				at    float64
				verdict
			}{{"ops", -5.5, 850, r.ops}, {"cpu", 5.5, 930, r.cpu}} {
				py := middle + v.shift
				if v.goal > 0 {
					line("goal", x(v.goal), py-5, x(v.goal), py+5)
				}
				if !v.known() {
					text("dim num", v.at, middle+4.5, "-")
					continue
				}
				line("span "+v.class, x(v.Low), py, x(v.High), py)
				mark := " missed"
				if v.goal == 0 || v.met() {
					mark = " met"
				}
				dot(v.class+mark, x(v.Median), py)
				text("num", v.at, middle+4.5, fmt.Sprintf("%.1fx", v.Median))
			}
		}
	})
	s.WriteString("</svg>\n")
	return s.String()
}

// scale is a range of powers of two that holds all ratios and goals.
func scale(results []result) (low, high float64) {
	low, high = 0.5, 8
	for _, r := range results {
		for _, v := range []verdict{r.ops, r.cpu} {
			for high < max(v.High, v.goal) && high < 64 {
				high *= 2
			}
			for v.known() && low > v.Low && low > 1.0/16 {
				low /= 2
			}
		}
	}
	return low, high
}
