package control

import (
	"sync"
	"testing"
	"time"
)

// Everything that is to be done is done, and not before laterBy is over.
func TestLater(t *testing.T) {
	l := NewLater()
	defer l.Close()
	for range 3 {
		start := time.Now()
		var done sync.WaitGroup
		for range 10 {
			done.Add(1)
			l.Do(func() {
				if took := time.Since(start); took < laterBy {
					t.Errorf("done after %v", took)
				}
				done.Done()
			})
		}
		done.Wait()
	}
}

// What waits when it is closed is done, and what comes after that.
func TestLaterClosed(t *testing.T) {
	l := NewLater()
	var done sync.WaitGroup
	done.Add(2)
	l.Do(done.Done)
	l.Close()
	l.Do(done.Done)
	done.Wait()
}
