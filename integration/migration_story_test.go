package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// story is a testing.TB whose failures say at which step they happened, and
// what everybody has to say about it. What is started belongs to the test that
// owns the story, failures to the subtest that is on.
type story struct {
	testing.TB
	owner testing.TB
	began time.Time
	now   string        // the step
	steps []string      // all, with their times
	logs  func() string // of everybody; who calls it has no more use for them
	ended bool          // logs has been called
}

func newStory(t testing.TB) *story { return &story{TB: t, owner: t, began: time.Now(), now: "begin"} }

// step begins the next step.
func (s *story) step(format string, args ...any) {
	s.now = fmt.Sprintf(format, args...)
	s.steps = append(s.steps, fmt.Sprintf("%8.3fs  %s\n", time.Since(s.began).Seconds(), s.now))
}

func (s *story) Cleanup(f func())  { s.owner.Cleanup(f) }
func (s *story) TempDir() string   { return s.owner.TempDir() }
func (s *story) Error(args ...any) { s.Helper(); s.TB.Error(s.at(fmt.Sprint(args...))) }
func (s *story) Fatal(args ...any) { s.Helper(); s.TB.Fatal(s.at(fmt.Sprint(args...)) + s.report()) }
func (s *story) Errorf(format string, args ...any) {
	s.Helper()
	s.TB.Error(s.at(fmt.Sprintf(format, args...)))
}

func (s *story) Fatalf(format string, args ...any) {
	s.Helper()
	s.TB.Fatal(s.at(fmt.Sprintf(format, args...)) + s.report())
}

func (s *story) at(message string) string {
	return fmt.Sprintf("at step %q: %s", s.now, lastLines(message, 100))
}

// report is the steps, and the first time also the logs.
func (s *story) report() string {
	text := "\n--- steps:\n" + lastLines(strings.Join(s.steps, ""), 80)
	if !s.ended && s.logs != nil {
		s.ended = true
		text += s.logs()
	}
	return text
}

// tellErrors tells the logs if there were errors that ended nothing.
func (s *story) tellErrors() {
	s.Helper()
	if s.Failed() && !s.ended {
		s.Log(s.report())
	}
}

func lastLines(text string, n int) string {
	all := strings.SplitAfter(text, "\n")
	if len(all) <= n {
		return text
	}
	return "...\n" + strings.Join(all[len(all)-n:], "")
}
