package qcow2

// Step names a part of Begin or Settle that writes. A crash between any two of
// them, or an error of one, leaves what the package comment says.
type Step string

// The steps of Begin, in their order. Each is left out where there is nothing to
// do.
const (
	StepRepair    Step = "repair"     // the refcounts, of an image that is dirty
	StepMarkClean Step = "mark-clean" // it is dirty no more
	StepAutoclear Step = "autoclear"  // features that are not known, cleared
)

// The steps of Settle, in their order but that those of a flush, StepRefcounts to
// StepGiveBack, come once for what the bitmaps were stored in, once for all, and
// again for what that has freed. All but StepRefcounts and StepSettled are left
// out where there is nothing to do.
const (
	StepStoreBitmaps Step = "store-bitmaps" // bits and their tables, in new clusters
	StepBitmapTables Step = "bitmap-tables" // the directory names these tables
	StepBitmapFlags  Step = "bitmap-flags"  // and says that they are consistent
	StepTrim         Step = "trim"          // the file ends with its last cluster
	StepRefcounts    Step = "refcounts"     // then all data and all refcounts are durable
	StepL2           Step = "l2"
	StepL1           Step = "l1"
	StepGiveBack     Step = "give-back" // clusters that no table names
	StepSettled      Step = "settled"   // all is done
)

// at tells Options.Step that Begin or Settle has come to s.
func (im *Image) at(s Step) {
	if im.opts.Step != nil && im.stepping {
		im.opts.Step(s)
	}
}
