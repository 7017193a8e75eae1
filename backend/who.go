package backend

// Ownership is what can be seen from outside of who owns an image.
type Ownership struct {
	Record RecordPlace
	Owner  *OwnerRecord // nil if there is no record
	// RecordErr is why what stands at Record.Path is no record, LocksErr why
	// it is not known what is locked.
	RecordErr, LocksErr error
	Locks               []int64 // bytes that somebody holds, in order
	Scope               string  // as of Owned.LockScope
}

// Written reports whether somebody holds the locks of one who writes. Other
// locks are those of readers.
func (o *Ownership) Written() bool {
	for _, b := range o.Locks {
		if b > lockUses && b < lockUses+int64(len(permNames)) {
			return true
		}
	}
	return false
}

// Who looks at the owner record and the locks of the image at path. It takes
// no lock and changes nothing. ownerRecord is as Options.OwnerRecord.
func Who(path, ownerRecord string) (*Ownership, error) {
	f, err := openFile(path, openHow{})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	o := &Ownership{Record: placeRecord(path, ownerRecord, f.traits.BlockDevice), Scope: f.lockScope()}
	if o.Record.Path != "" {
		o.Owner, _, o.RecordErr = readRecord(o.Record.Path, nil)
	}
	all := lockSet{uses: 1<<len(permNames) - 1, forbids: 1<<len(permNames) - 1}
	look := func(b lockByte) error {
		held, err := f.heldElsewhere(f.fd, b)
		if held && err == nil {
			o.Locks = append(o.Locks, int64(b))
		}
		return err
	}
	if o.LocksErr = all.each(lockUses, all.uses, look); o.LocksErr == nil {
		o.LocksErr = all.each(lockForbids, all.forbids, look)
	}
	return o, nil
}
