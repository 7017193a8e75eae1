package backend

import (
	"bytes"
	"encoding/json"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A record is written as encoding/json writes it, and read as that reads it.
func TestRecordForm(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.OneOf(rapid.StringMatching(`[ -~]{0,20}`), rapid.String())
		r := OwnerRecord{
			PID:   rapid.IntRange(-2, 1<<22).Draw(t, "pid"),
			Since: time.Unix(rapid.Int64Range(0, 1<<36).Draw(t, "since"), rapid.Int64Range(0, 1e9-1).Draw(t, "ns")),
			Epoch: rapid.Uint64().Draw(t, "epoch"), Clean: rapid.Bool().Draw(t, "clean"),
		}
		usual := r.PID > 0 && r.Epoch > 0 && r.Epoch < epochMax
		v := reflect.ValueOf(&r).Elem()
		for i := range v.NumField() { // also those that are added one day
			name := v.Type().Field(i).Name
			if f := v.Field(i); f.Kind() == reflect.String {
				f.SetString(text.Draw(t, name))
				usual = usual && plain(f.String())
			} else if !slices.Contains([]string{"PID", "Since", "Epoch", "Clean"}, name) {
				t.Fatalf("%s is not drawn", name)
			}
		}
		usual = usual && r.Host != ""
		if rapid.Bool().Draw(t, "UTC") {
			r.Since = r.Since.UTC()
		}
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		if err := enc.Encode(&r); err != nil {
			t.Fatal(err)
		}
		if got := r.bytes(); !bytes.Equal(got, b.Bytes()) {
			t.Fatalf("%s, want %s", got, b.Bytes())
		}
		if rapid.Bool().Draw(t, "padded") {
			short := b.Len()
			b = *bytes.NewBuffer(padded(b.Bytes()))
			if b.Len() != max(short, recordSector) {
				t.Fatalf("%d bytes became %d", short, b.Len())
			}
		}
		got, want := tryForm(t, b.Bytes())
		if (got != nil) != usual {
			t.Fatalf("read %v of what encoding/json reads as %+v", got, want)
		}
		// Nor is anything read otherwise that is not quite a record.
		if n := b.Len(); n > 0 {
			damaged := bytes.Clone(b.Bytes())
			at := rapid.IntRange(0, n-1).Draw(t, "at")
			damaged[at] = byte(rapid.OneOf(rapid.SampledFrom([]int{'"', ',', '\n', '0', 'e', ' '}), rapid.IntRange(0, 255)).Draw(t, "byte"))
			tryForm(t, damaged)
			tryForm(t, b.Bytes()[:at])
		}
	})
}

// tryForm holds parseOwnForm, if it reads b, against encoding/json.
func tryForm(t *rapid.T, b []byte) (got *OwnerRecord, want OwnerRecord) {
	err := json.Unmarshal(b, &want)
	got, ok := parseOwnForm(b)
	if !ok {
		return nil, want
	}
	if err != nil || !got.Since.Equal(want.Since) {
		t.Fatalf("%s: %v; since %v, want %v", b, err, got.Since, want.Since)
	}
	w := want
	w.Since = got.Since
	if !reflect.DeepEqual(*got, w) {
		t.Fatalf("%s: %+v, want %+v", b, *got, w)
	}
	return got, want
}
